"""Answers with their rewards, in the form of AlpacaEval's `model_outputs.json`."""

from __future__ import annotations

import json
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
        DataError: the file is not a JSON list, or a row lacks a field.
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
                    mean=row["reward_mean"],
                    std=row["reward_std"],
                    objective_weights=_numbered(row, WEIGHT_PREFIX),
                    objective_scores=_numbered(row, SCORE_PREFIX),
                    concentration=row["reward_concentration"],
                ),
            )
            for row in rows
        ]
    except (DataError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no scored answers: {error!r}") from error


def _numbered(row: Mapping[str, Any], prefix: str) -> tuple[float, ...]:
    return tuple(row[f"{prefix}{k}"] for k in range(sum(name.startswith(prefix) for name in row)))
