"""Benchmark answers in AlpacaEval's `model_outputs.json` form, plus their reward."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pipeline.errors import DataError
from pipeline.records import Answer, RewardScore


def write_answers(path: Path, answers: Sequence[Answer], *, dataset: str) -> None:
    """A JSON list of {instruction, output, generator, dataset}, as alpaca_eval reads it; ours stand beside them."""
    rows = [
        {
            "instruction": answer.instruction,
            "output": answer.output,
            "generator": answer.generator,
            "dataset": dataset,
            "prompt_id": answer.prompt_id,
            "score": asdict(answer.score),
        }
        for answer in answers
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False))


def read_answers(path: Path) -> list[Answer]:
    """Answers that `write_answers` wrote.

    Raises:
        DataError: no JSON list, or a row without its fields.
    """
    try:
        rows = json.loads(path.read_text())
        return [
            Answer(
                prompt_id=row["prompt_id"],
                instruction=row["instruction"],
                output=row["output"],
                generator=row["generator"],
                score=RewardScore(
                    mean=row["score"]["mean"],
                    std=row["score"]["std"],
                    objective_weights=tuple(row["score"]["objective_weights"]),
                    objective_scores=tuple(row["score"]["objective_scores"]),
                    concentration=row["score"].get("concentration", 0.0),
                ),
            )
            for row in rows
        ]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no scored answers: {error!r}") from error
