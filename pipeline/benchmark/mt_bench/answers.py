"""MT-Bench's answer files: the answers to two turns, as FastChat writes and reads them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.data.files import Row, read_rows
from pipeline.errors import DataError
from pipeline.stages.storage import write_text

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "reasoning": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "extraction": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""Category -> sampling temperature of the answers."""
OTHER_TEMPERATURE = 0.7
"""Sampling temperature for a category that MT-Bench does not have."""


@dataclass(frozen=True, kw_only=True)
class MTBenchAnswer:
    """One model's answers to the two turns of a question. Reference answers have the same form."""

    question_id: int
    model: str
    turns: tuple[str, ...]
    place: str = field(default="an answer", compare=False, repr=False)
    """File and line of the answer."""


def read_mt_bench_answers(files: Sequence[str]) -> list[MTBenchAnswer]:
    """The first choice of every row of model_answer/<model>.jsonl, or of reference_answer/<judge>.jsonl.

    Raises:
        DataError: a row is not an answer. Names file, line and field.
    """
    return [_answer(row) for file in files for row in read_rows(file)]


def write_mt_bench_answers(path: Path, answers: Sequence[MTBenchAnswer]) -> None:
    """Writes one choice per answer, as FastChat's gen_judgment reads them."""
    rows = [
        {
            "question_id": answer.question_id,
            "answer_id": _answer_id(answer),
            "model_id": answer.model,
            "choices": [{"index": 0, "turns": list(answer.turns)}],
            "tstamp": time.time(),
        }
        for answer in answers
    ]
    write_text(str(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _answer_id(answer: MTBenchAnswer) -> str:
    """22 hex digits, which identify the content of the answer."""
    content = json.dumps([answer.question_id, answer.model, answer.turns])
    return hashlib.sha256(content.encode()).hexdigest()[:22]


def _answer(row: Row) -> MTBenchAnswer:
    try:
        turns = row.values["choices"][0]["turns"]
        return MTBenchAnswer(
            question_id=row.require("question_id", int),
            model=row.require("model_id", str),
            turns=tuple(turns),
            place=row.place,
        )
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(f"{row.place}: no choices[0].turns ({error!r})") from error
