"""The benchmarks that a model can answer: their questions, sampling settings and answer files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.benchmark.alpaca_eval.model_outputs import ModelOutput, write_model_outputs
from pipeline.benchmark.arena_hard.answers import ENCODINGS, ArenaAnswer, upstream_token_counter, write_arena_answers
from pipeline.benchmark.arena_hard.battles import Rules
from pipeline.benchmark.arena_hard.questions import arena_question
from pipeline.benchmark.benchmark_question import AnsweredQuestion, BenchmarkQuestion
from pipeline.benchmark.mt_bench.answers import (
    OTHER_TEMPERATURE,
    TEMPERATURES,
    MTBenchAnswer,
    write_mt_bench_answers,
)
from pipeline.benchmark.mt_bench.questions import mt_bench_question
from pipeline.data.files import Row, read_hub_rows, read_rows
from pipeline.errors import DataError

HUB = "hub:"


@dataclass(frozen=True, kw_only=True)
class AnsweredBenchmark:
    """A model's answers to a benchmark, and its tokeniser as a counter of tokens."""

    model: str
    answers: Sequence[AnsweredQuestion]
    count_tokens: Callable[[str], int]
    """Length of a text in the model's own tokens."""


@dataclass(frozen=True, kw_only=True)
class GeneratedBenchmark:
    """How the questions of one benchmark are read and sampled, and how its answers are written."""

    parse: Callable[[Row], BenchmarkQuestion]
    files: tuple[str, ...]
    """File names under which a directory may hold the questions."""
    num_questions: int
    """Size of the official set."""
    max_response_tokens: int
    """Token limit of the answer to one turn."""
    answers_are_paired_by_text: bool
    """Whether the evaluator finds a question by its text, so that a repeated text would be two answers to one."""
    write: Callable[[Path, AnsweredBenchmark], dict[str, Any]]
    """Writes the benchmark's answer files below a directory; returns entries for the summary."""


def read_benchmark_questions(benchmark: GeneratedBenchmark, source: str) -> list[BenchmarkQuestion]:
    """The questions of a benchmark.

    Args:
        source: a file, a directory that holds one of `benchmark.files`, or "hub:<data set>[:<split>]".

    Raises:
        DataError: the source has no questions, a question has an empty turn, or an id occurs twice; or a text does
            where the benchmark pairs answers by it. Names file and line.
    """
    questions: dict[int | str, BenchmarkQuestion] = {}
    places: dict[tuple[str, ...], str] = {}
    for row in _rows(benchmark, source):
        question = benchmark.parse(row)
        if not all(turn.strip() for turn in question.turns):
            raise DataError(f"{row.place}: question {question.id} has an empty turn. Fix it, or leave the row out.")
        if question.id in questions:
            first = questions[question.id].place
            raise DataError(f"{row.place}: question {question.id} is already at {first}. Keep one of them.")
        if benchmark.answers_are_paired_by_text and question.turns in places:
            raise DataError(
                f"{row.place}: {question.turns[0]!r:.80} is already at {places[question.turns]}. Answers are paired by "
                "this text: keep one of the two."
            )
        questions[question.id], places[question.turns] = question, row.place
    if not questions:
        raise DataError(f"{source} holds no questions")
    return list(questions.values())


def _rows(benchmark: GeneratedBenchmark, source: str) -> Iterator[Row]:
    if source.startswith(HUB):
        name, _, split = source.removeprefix(HUB).partition(":")
        return read_hub_rows(name, split or "train", remedy="give --prompts its file")
    path = Path(source)
    if path.is_dir():
        existing = [path / name for name in benchmark.files if (path / name).is_file()]
        if not existing:
            raise DataError(
                f"{path} holds no {' or '.join(benchmark.files)}. Give the file itself, or {HUB}<data set>."
            )
        path = existing[0]
    return read_rows(str(path))


# ----------------------------------------------------------------------------- AlpacaEval


def _alpaca_question(row: Row) -> BenchmarkQuestion:
    return BenchmarkQuestion(
        id=row.values["index"] if isinstance(row.values.get("index"), int) else row.number - 1,
        turns=(row.require("instruction", str),),
        # AlpacaEval lets each model choose its sampling. Most of its model configs use 0.7 and 2048 tokens.
        temperature=0.7,
        group=str(row.values.get("dataset") or ""),
        place=row.place,
    )


def _write_alpaca(out: Path, answered: AnsweredBenchmark) -> dict[str, Any]:
    path = out / "model_outputs.json"
    outputs = [
        ModelOutput(
            instruction=answer.question.turns[0],
            output=answer.outputs[0],
            generator=answered.model,
            dataset=answer.question.group,
        )
        for answer in answered.answers
    ]
    write_model_outputs(path, outputs)
    return {"files": [str(path)]}


# ----------------------------------------------------------------------------- Arena-Hard


def _arena_question(row: Row) -> BenchmarkQuestion:
    question = arena_question(row)
    return BenchmarkQuestion(
        id=question.question_id,
        turns=(question.prompt,),
        temperature=0.0,
        group=question.category,
        place=row.place,
    )


def _write_arena(out: Path, answered: AnsweredBenchmark) -> dict[str, Any]:
    """Writes the files of both editions, each with the token counts of its edition."""
    prompts = {str(answer.question.id): answer.question.turns[0] for answer in answered.answers}
    editions: tuple[Rules, Rules] = ("v0.1", "v2")
    files, tokens = [], {}
    for rules in editions:
        count = upstream_token_counter(rules)
        tokens[rules] = "the model's own" if count is None else f"tiktoken {ENCODINGS[rules]}"
        path = out / rules / "model_answer" / f"{answered.model}.jsonl"
        answers = [
            ArenaAnswer(
                question_id=str(answer.question.id),
                model=answered.model,
                output=answer.outputs[0],
                num_tokens=(count or answered.count_tokens)(answer.outputs[0]),
            )
            for answer in answered.answers
        ]
        write_arena_answers(path, answers, prompts=prompts, rules=rules)
        files.append(str(path))
    return {"files": files, "token_len": tokens}


# ----------------------------------------------------------------------------- MT-Bench


def _mt_bench_question(row: Row) -> BenchmarkQuestion:
    question = mt_bench_question(row)
    return BenchmarkQuestion(
        id=question.question_id,
        turns=question.turns,
        temperature=TEMPERATURES.get(question.category, OTHER_TEMPERATURE),
        group=question.category,
        place=row.place,
    )


def _write_mt_bench(out: Path, answered: AnsweredBenchmark) -> dict[str, Any]:
    path = out / "model_answer" / f"{answered.model}.jsonl"
    answers = [
        MTBenchAnswer(question_id=int(answer.question.id), model=answered.model, turns=answer.outputs)
        for answer in answered.answers
    ]
    write_mt_bench_answers(path, answers)
    return {"files": [str(path)]}


GENERATED_BENCHMARKS = {
    "alpaca_eval": GeneratedBenchmark(
        parse=_alpaca_question,
        files=("instructions.jsonl", "alpaca_eval.json"),
        num_questions=805,
        max_response_tokens=2048,
        answers_are_paired_by_text=True,
        write=_write_alpaca,
    ),
    "arena_hard": GeneratedBenchmark(
        parse=_arena_question,
        files=("question.jsonl",),
        num_questions=500,
        max_response_tokens=4096,
        answers_are_paired_by_text=False,
        write=_write_arena,
    ),
    "mt_bench": GeneratedBenchmark(
        parse=_mt_bench_question,
        files=("question.jsonl",),
        num_questions=80,
        max_response_tokens=1024,
        answers_are_paired_by_text=False,
        write=_write_mt_bench,
    ),
}
"""The settings are those of docs/method.md section 12."""
