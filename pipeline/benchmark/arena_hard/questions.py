"""Arena-Hard's `question.jsonl`, in the layouts of both editions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.benchmark.question_file import read_question_file
from pipeline.data.files import Row
from pipeline.errors import DataError


@dataclass(frozen=True, kw_only=True)
class ArenaQuestion:
    """One question of one turn."""

    question_id: str
    category: str
    prompt: str


def read_arena_questions(path: Path) -> list[ArenaQuestion]:
    """The questions of a `question.jsonl`.

    Raises:
        DataError: as `read_question_file`.
    """
    return read_question_file(path, arena_question)


def arena_question(row: Row) -> ArenaQuestion:
    """The question of a row, in the v2 layout {uid, category, prompt} or v0.1's {question_id, category, turns}.

    Raises:
        DataError: the row has neither layout, or several turns.
    """
    if "uid" in row.values:
        question_id, prompt = row.require("uid", str), row.require("prompt", str)
    else:
        question_id, turns = row.require("question_id", str), row.require("turns", list)
        if len(turns) != 1 or not isinstance(turns[0], dict) or not isinstance(turns[0].get("content"), str):
            raise DataError(f"{row.place}, field 'turns': {turns!r:.60} is not one turn with its content")
        prompt = turns[0]["content"]
    return ArenaQuestion(question_id=question_id, category=row.require("category", str), prompt=prompt)
