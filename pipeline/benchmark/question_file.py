"""A benchmark's `question.jsonl`, read by the benchmark's own row parser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pipeline.data.files import Row, read_rows
from pipeline.errors import DataError


class IdentifiedQuestion(Protocol):
    """A question with an id that is unique in its file."""

    @property
    def question_id(self) -> Any: ...


Q = TypeVar("Q", bound=IdentifiedQuestion)


def read_question_file(path: Path, parse: Callable[[Row], Q]) -> list[Q]:
    """The questions of a file with one question per row.

    Args:
        parse: turns a row into a question, and raises DataError for a row of another layout.

    Raises:
        DataError: a row is not such a question, or repeats an id. Names file and line.
    """
    questions: dict[Any, Q] = {}
    for row in read_rows(str(path)):
        question = parse(row)
        if question.question_id in questions:
            raise DataError(f"{row.place}: question {question.question_id} is there already; keep one")
        questions[question.question_id] = question
    return list(questions.values())
