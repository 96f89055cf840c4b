"""MT-Bench's `question.jsonl`: questions of two turns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.benchmark.question_file import read_question_file
from pipeline.data.files import Row
from pipeline.errors import DataError


@dataclass(frozen=True, kw_only=True)
class MTBenchQuestion:
    """One question of two turns."""

    question_id: int
    category: str
    turns: tuple[str, str]


def read_mt_bench_questions(path: Path) -> list[MTBenchQuestion]:
    """The questions of a `question.jsonl`.

    Raises:
        DataError: as `read_question_file`.
    """
    return read_question_file(path, mt_bench_question)


def mt_bench_question(row: Row) -> MTBenchQuestion:
    """The question of a row {question_id, category, turns: [2]}.

    Raises:
        DataError: the row has another layout.
    """
    turns = row.require("turns", list)
    if len(turns) != 2 or not all(isinstance(turn, str) for turn in turns):
        raise DataError(
            f"{row.place}, field 'turns': {len(turns)} turns, {turns!r:.60}; an MT-Bench question has two turns of text"
        )
    return MTBenchQuestion(
        question_id=row.require("question_id", int), category=row.require("category", str), turns=tuple(turns)
    )
