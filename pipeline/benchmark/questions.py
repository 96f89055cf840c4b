"""What the benchmarks ask a model, and how it shall answer: questions, sampling settings, files of answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.benchmark.alpaca_eval import judging as alpaca_eval_judging
from pipeline.benchmark.alpaca_eval.judging import ModelOutput
from pipeline.benchmark.arena_hard import files as arena_hard_files
from pipeline.benchmark.arena_hard.judging import arena_question
from pipeline.benchmark.arena_hard.win_rates import Rules
from pipeline.benchmark.mt_bench import grades as mt_bench
from pipeline.benchmark.mt_bench.judging import mt_bench_question
from pipeline.data.files import Row, read_hub_rows, read_rows
from pipeline.errors import DataError

HUB = "hub:"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One item of a benchmark: a conversation whose user turns are given."""

    id: int | str
    turns: tuple[str, ...]
    temperature: float
    group: str
    """AlpacaEval's `dataset`, the category of the others."""
    place: str
    """Where it stands, for a letter."""


@dataclass(frozen=True, kw_only=True)
class AnsweredQuestion:
    """A question with the model's answer to each turn."""

    question: Question
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class AnsweredBenchmark:
    """What writing the answers needs."""

    model: str
    answers: Sequence[AnsweredQuestion]
    count_tokens: Callable[[str], int]
    """In the model's own tokens."""


@dataclass(frozen=True, kw_only=True)
class GeneratedBenchmark:
    """One benchmark: how its questions are read, sampled and written."""

    parse: Callable[[Row], Question]
    files: tuple[str, ...]
    """Names under which its questions are looked for in a directory."""
    num_questions: int
    """Of the official set."""
    max_response_tokens: int
    """Of each turn."""
    write: Callable[[Path, AnsweredBenchmark], dict[str, Any]]
    """Writes the benchmark's own files below a directory; returns what the summary should say of them."""


def read_questions(benchmark: GeneratedBenchmark, source: str) -> list[Question]:
    """The questions of a benchmark.

    Args:
        source: a file, a directory that holds one of `benchmark.files`, or "hub:<data set>[:<split>]".

    Raises:
        DataError: no questions there, one without words, or one id twice; names file and line.
    """
    questions: dict[int | str, Question] = {}
    for row in _rows(benchmark, source):
        question = benchmark.parse(row)
        if not all(turn.strip() for turn in question.turns):
            raise DataError(f"{row.place}: question {question.id} has an empty turn. Mend it, or leave the row out.")
        if question.id in questions:
            first = questions[question.id].place
            raise DataError(f"{row.place}: question {question.id} stands at {first} already. Keep one of them.")
        questions[question.id] = question
    if not questions:
        raise DataError(f"{source} holds no questions")
    return list(questions.values())


def _rows(benchmark: GeneratedBenchmark, source: str) -> Iterator[Row]:
    if source.startswith(HUB):
        name, _, split = source.removeprefix(HUB).partition(":")
        return read_hub_rows(name, split or "train", remedy="give --prompts its file")
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in benchmark.files if (path / name).is_file()]
        if not found:
            raise DataError(
                f"{path} holds no {' or '.join(benchmark.files)}. Give the file itself, or {HUB}<data set>."
            )
        path = found[0]
    return read_rows(str(path))


# ----------------------------------------------------------------------------- AlpacaEval


def _alpaca_question(row: Row) -> Question:
    return Question(
        id=row.values["index"] if isinstance(row.values.get("index"), int) else row.number - 1,
        turns=(row.require("instruction", str),),
        # AlpacaEval leaves sampling to each model; these are what most of its model configs say, with 2048 tokens.
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
    alpaca_eval_judging.write_model_outputs(path, outputs)
    return {"files": [str(path)]}


# ----------------------------------------------------------------------------- Arena-Hard


def _arena_question(row: Row) -> Question:
    question = arena_question(row)
    return Question(
        id=question.uid, turns=(question.prompt,), temperature=0.0, group=question.category, place=row.place
    )


def _write_arena(out: Path, answered: AnsweredBenchmark) -> dict[str, Any]:
    """Both layouts, each with the lengths of its own edition."""
    prompts = {str(answer.question.id): answer.question.turns[0] for answer in answered.answers}
    editions: tuple[Rules, Rules] = ("v0.1", "v2")
    files, tokens = [], {}
    for rules in editions:
        count = arena_hard_files.upstream_token_counter(rules)
        tokens[rules] = "the model's own" if count is None else f"tiktoken {arena_hard_files.ENCODINGS[rules]}"
        path = out / rules / "model_answer" / f"{answered.model}.jsonl"
        answers = [
            arena_hard_files.ModelAnswer(
                question_id=str(answer.question.id),
                model=answered.model,
                output=answer.outputs[0],
                num_tokens=(count or answered.count_tokens)(answer.outputs[0]),
            )
            for answer in answered.answers
        ]
        arena_hard_files.write_answers(path, answers, prompts=prompts, rules=rules)
        files.append(str(path))
    return {"files": files, "token_len": tokens}


# ----------------------------------------------------------------------------- MT-Bench


def _mt_bench_question(row: Row) -> Question:
    question = mt_bench_question(row)
    return Question(
        id=question.question_id,
        turns=question.turns,
        temperature=mt_bench.TEMPERATURES.get(question.category, mt_bench.OTHER_TEMPERATURE),
        group=question.category,
        place=row.place,
    )


def _write_mt_bench(out: Path, answered: AnsweredBenchmark) -> dict[str, Any]:
    path = out / "model_answer" / f"{answered.model}.jsonl"
    answers = [
        mt_bench.ModelAnswer(question_id=int(answer.question.id), model=answered.model, turns=answer.outputs)
        for answer in answered.answers
    ]
    mt_bench.write_answers(path, answers)
    return {"files": [str(path)]}


BENCHMARKS = {
    "alpaca_eval": GeneratedBenchmark(
        parse=_alpaca_question,
        files=("instructions.jsonl", "alpaca_eval.json"),
        num_questions=805,
        max_response_tokens=2048,
        write=_write_alpaca,
    ),
    "arena_hard": GeneratedBenchmark(
        parse=_arena_question,
        files=("question.jsonl",),
        num_questions=500,
        max_response_tokens=4096,
        write=_write_arena,
    ),
    "mt_bench": GeneratedBenchmark(
        parse=_mt_bench_question,
        files=("question.jsonl",),
        num_questions=80,
        max_response_tokens=1024,
        write=_write_mt_bench,
    ),
}
"""docs/method.md section 12."""
