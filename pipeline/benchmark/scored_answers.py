"""Answers with their rewards, in the form of AlpacaEval's `model_outputs.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.files import read_json
from pipeline.errors import DataError
from pipeline.records import Answer, RewardScore

WEIGHT_PREFIX, SCORE_PREFIX = "objective_weight_", "objective_score_"


def write_scored_answers(path: Path, answers: Sequence[Answer], *, dataset: str) -> None:
    """Writes a JSON list of {instruction, output, generator, dataset}, as alpaca_eval reads it, with our own fields.

    Every value is a string or a number, because alpaca_eval looks for repeated rows and fails on nested values.
    """
    rows = [
        {
            "instruction": answer.instruction,
            "output": answer.output,
            "generator": answer.generator,
            "dataset": dataset,
            "prompt_id": answer.prompt_id,
            "reward_mean": answer.score.mean,
            "reward_std": answer.score.std,
            "reward_concentration": answer.score.concentration,
            "reward_temperature": answer.score.temperature,
            "reward_deviations": " ".join(f"{value:.6g}" for value in answer.score.deviations),
            **{f"{WEIGHT_PREFIX}{k}": value for k, value in enumerate(answer.score.objective_weights)},
            **{f"{SCORE_PREFIX}{k}": value for k, value in enumerate(answer.score.objective_scores)},
        }
        for answer in answers
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False))


def read_scored_answers(path: Path) -> list[Answer]:
    """Reads the answers that `write_scored_answers` wrote.

    Raises:
        DataError: the file is not a JSON list, a row lacks a field, or a reward is not a finite number.
    """
    try:
        rows = read_json(path)
        return [
            Answer(
                prompt_id=row["prompt_id"],
                instruction=row["instruction"],
                output=row["output"],
                generator=row["generator"],
                score=RewardScore(
                    mean=_finite(row, "reward_mean"),
                    std=_finite(row, "reward_std"),
                    objective_weights=_numbered(row, WEIGHT_PREFIX),
                    objective_scores=_numbered(row, SCORE_PREFIX),
                    concentration=_finite(row, "reward_concentration"),
                    temperature=_finite(row, "reward_temperature"),
                    deviations=tuple(float(value) for value in row["reward_deviations"].split()),
                ),
            )
            for row in rows
        ]
    except (DataError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} holds no scored answers: {error!r}") from error


def _numbered(row: Mapping[str, Any], prefix: str) -> tuple[float, ...]:
    return tuple(_finite(row, f"{prefix}{k}") for k in range(sum(name.startswith(prefix) for name in row)))


def _finite(row: Mapping[str, Any], field: str) -> float:
    """The value of a field. A NaN would make every comparison with it a tie."""
    value = row[field]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{field!r} of the answer to {row['instruction']!r:.60} is {value!r:.40}, no finite number")
    return value
