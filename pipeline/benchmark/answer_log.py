"""Answers to benchmark questions on disk, turn by turn as they come: what a killed run had is not sampled again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.benchmark.benchmark_question import BenchmarkQuestion
from pipeline.data.files import AppendedLines
from pipeline.errors import DataError
from pipeline.records import FinishReason


@dataclass(frozen=True, kw_only=True)
class AnsweredTurn:
    """The model's answer to one turn."""

    output: str
    num_tokens: int
    """Sampled, the end of the turn included."""
    finish_reason: FinishReason


class AnswerLog:
    """A file whose first line says who answers and how, and every other line one turn's answer."""

    def __init__(self, lines: AppendedLines, turns: dict[int | str, list[AnsweredTurn]]) -> None:
        self._lines = lines
        self._turns = turns

    @classmethod
    @contextmanager
    def open(
        cls, path: Path, settings: Mapping[str, Any], questions: Sequence[BenchmarkQuestion]
    ) -> Iterator[AnswerLog]:
        """The answers a file holds, and the file itself for more; made where it does not exist.

        Args:
            settings: whatever the answers depend on besides the questions; values as JSON knows them.
            questions: all of the benchmark, also those that this run leaves out.

        Raises:
            WorkspaceLocked: another run appends to it.
            DataError: it holds answers of another model, under other settings or to other questions; names the line.
        """
        with AppendedLines.open(path, elsewhere="--out") as lines:
            written = lines.content.splitlines()
            if written:
                _require_same(settings, _row(written[0], path, 1), path)
            else:
                lines.append(settings)
            asked = {question.id: question for question in questions}
            turns: dict[int | str, list[AnsweredTurn]] = {}
            for number, line in enumerate(written[1:], start=2):
                _take(_row(line, path, number), asked, turns, place=f"{path}, line {number}")
            yield cls(lines, turns)

    def turns(self, question: BenchmarkQuestion) -> tuple[AnsweredTurn, ...]:
        """The turns of a question that are answered, in order."""
        return tuple(self._turns.get(question.id, ()))

    def append(self, question: BenchmarkQuestion, turn: AnsweredTurn) -> None:
        """Keeps the answer to the next turn of a question."""
        turns = self._turns.setdefault(question.id, [])
        place = {"question_id": question.id, "turn": len(turns) + 1, "asked": _asked(question, len(turns) + 1)}
        self._lines.append(place | asdict(turn) | {"tstamp": time.time()})
        turns.append(turn)


def _asked(question: BenchmarkQuestion, turn: int) -> str:
    """Identity of what the model was asked up to a turn."""
    words = json.dumps([question.turns[:turn], question.temperature], ensure_ascii=True)
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def _row(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if isinstance(row, dict):
            return row
    except ValueError:
        pass
    raise DataError(
        f"{path}, line {number}: no JSON object: {line[:60].decode(errors='replace')}. "
        "Take the line out: what it answered is sampled again."
    )


def _require_same(settings: Mapping[str, Any], written: Mapping[str, Any], path: Path) -> None:
    for field, value in settings.items():
        if written.get(field) != value:
            raise DataError(
                f"{path}, line 1: these answers were sampled with {field} = {written.get(field)!r}, this run has "
                f"{value!r}. Give another --out, or delete that directory."
            )


def _take(
    row: Mapping[str, Any],
    asked: Mapping[int | str, BenchmarkQuestion],
    turns: dict[int | str, list[AnsweredTurn]],
    *,
    place: str,
) -> None:
    try:
        question_id, number = row["question_id"], row["turn"]
        answered = AnsweredTurn(output=row["output"], num_tokens=row["num_tokens"], finish_reason=row["finish_reason"])
    except KeyError as error:
        raise DataError(f"{place}: no answer, field {error} is missing. Take the line out.") from error
    question = asked.get(question_id)
    if question is None:
        raise DataError(
            f"{place}: answers question {question_id!r}, which the prompts do not hold. Give another --out."
        )
    before = turns.setdefault(question_id, [])
    if number != len(before) + 1 or number > len(question.turns):
        raise DataError(
            f"{place}: answers turn {number} of question {question_id}, after {len(before)} of "
            f"{len(question.turns)} turns. Take the line out."
        )
    if row.get("asked") != _asked(question, number):
        raise DataError(
            f"{place}: question {question_id} reads differently now ({question.place}). Give another --out, or the "
            "prompts of that run."
        )
    before.append(answered)
