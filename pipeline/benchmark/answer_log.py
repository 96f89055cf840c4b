"""Answers to benchmark questions on disk, one line per turn. A resumed run does not sample stored turns again."""

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
    """Number of sampled tokens, the end of the turn included."""
    finish_reason: FinishReason


class AnswerLog:
    """A file of answers. The first line holds the model and the settings, each further line the answer to one turn."""

    def __init__(self, lines: AppendedLines, turns: dict[int | str, list[AnsweredTurn]]) -> None:
        self._lines = lines
        self._turns = turns

    @classmethod
    @contextmanager
    def open(
        cls, path: Path, settings: Mapping[str, Any], questions: Sequence[BenchmarkQuestion]
    ) -> Iterator[AnswerLog]:
        """Reads the answers of a file and opens it for appending; creates the file if it does not exist.

        Args:
            settings: everything besides the questions that the answers depend on; JSON values.
            questions: all questions of the benchmark, including those that this run leaves out.

        Raises:
            WorkspaceLocked: another run appends to the file.
            DataError: the file holds answers of another model, with other settings or to other questions. Names the
                line.
        """
        with AppendedLines.open(path, option="--out") as lines:
            written = lines.content.splitlines()
            if written:
                _require_same(settings, _row(written[0], path, 1), path)
            else:
                lines.append(settings)
            by_id = {question.id: question for question in questions}
            turns: dict[int | str, list[AnsweredTurn]] = {}
            for number, line in enumerate(written[1:], start=2):
                _add_turn(_row(line, path, number), by_id, turns, place=f"{path}, line {number}")
            yield cls(lines, turns)

    def turns(self, question: BenchmarkQuestion) -> tuple[AnsweredTurn, ...]:
        """The answers to the turns of a question so far, in order."""
        return tuple(self._turns.get(question.id, ()))

    def append(self, question: BenchmarkQuestion, turn: AnsweredTurn) -> None:
        """Stores the answer to the next turn of a question."""
        turns = self._turns.setdefault(question.id, [])
        place = {
            "question_id": question.id,
            "turn": len(turns) + 1,
            "asked": _conversation_hash(question, len(turns) + 1),
        }
        self._lines.append(place | asdict(turn) | {"tstamp": time.time()})
        turns.append(turn)


def _conversation_hash(question: BenchmarkQuestion, turn: int) -> str:
    """16 hex digits over the user turns up to `turn` and the temperature."""
    conversation = json.dumps([question.turns[:turn], question.temperature], ensure_ascii=True)
    return hashlib.sha256(conversation.encode()).hexdigest()[:16]


def _row(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if isinstance(row, dict):
            return row
    except ValueError:
        pass
    raise DataError(
        f"{path}, line {number}: no JSON object: {line[:60].decode(errors='replace')}. "
        "Delete the line; its turn is then sampled again."
    )


def _require_same(settings: Mapping[str, Any], written: Mapping[str, Any], path: Path) -> None:
    for field, value in settings.items():
        if written.get(field) != value:
            raise DataError(
                f"{path}, line 1: these answers were sampled with {field} = {written.get(field)!r}, this run has "
                f"{value!r}. Give another --out, or delete that directory."
            )


def _add_turn(
    row: Mapping[str, Any],
    by_id: Mapping[int | str, BenchmarkQuestion],
    turns: dict[int | str, list[AnsweredTurn]],
    *,
    place: str,
) -> None:
    try:
        question_id, number = row["question_id"], row["turn"]
        turn = AnsweredTurn(output=row["output"], num_tokens=row["num_tokens"], finish_reason=row["finish_reason"])
    except KeyError as error:
        raise DataError(f"{place}: no answer, field {error} is missing. Delete the line.") from error
    question = by_id.get(question_id)
    if question is None:
        raise DataError(
            f"{place}: answers question {question_id!r}, which is not among the prompts. Give another --out."
        )
    earlier = turns.setdefault(question_id, [])
    if number != len(earlier) + 1 or number > len(question.turns):
        raise DataError(
            f"{place}: answers turn {number} of question {question_id}, after {len(earlier)} of "
            f"{len(question.turns)} turns. Delete the line."
        )
    if row.get("asked") != _conversation_hash(question, number):
        raise DataError(
            f"{place}: question {question_id} has changed since then ({question.place}). Give another --out, or the "
            "prompts of that run."
        )
    earlier.append(turn)
