"""AlpacaEval's `annotations.json`: a judge's preferences between a baseline and a model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.benchmark.verdict_number import read_verdict_number
from pipeline.data.files import Row, read_rows
from pipeline.errors import DataError, ShapeError


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """A judge's preferences between a baseline and a model; row i of each column belongs to the same instruction.

    Raises:
        ShapeError: columns of different length.
        DataError: an instruction occurs twice.
    """

    baseline: str
    model: str
    instructions: Sequence[str]
    preferences: Sequence[float | None]
    """[N] in [1, 2], as in `preferences_as_probabilities`."""
    baseline_lengths: Sequence[int]
    """[N] characters of the baseline's answers."""
    model_lengths: Sequence[int]
    """[N] characters of the model's answers."""
    judge: str = ""
    """The file's `annotator`; empty where the file does not name it."""

    def win_probabilities(self) -> list[float | None]:
        """[N] probability in [0, 1] that the model's answer is the better one; None without a verdict."""
        return [None if math.isnan(p) else float(p) for p in preferences_as_probabilities(self.preferences)]

    def __post_init__(self) -> None:
        columns = (self.instructions, self.preferences, self.baseline_lengths, self.model_lengths)
        if len({len(column) for column in columns}) > 1:
            raise ShapeError(
                f"annotations of {self.model}: {len(self.instructions)} instructions, {len(self.preferences)} "
                f"preferences, {len(self.baseline_lengths)} and {len(self.model_lengths)} lengths. Give one per row."
            )
        repeated = [text for text, count in Counter(self.instructions).items() if count > 1]
        if repeated:
            raise DataError(
                f"annotations of {self.model}: {len(repeated)} instructions occur more than once, first "
                f"{quoted_start(repeated[0])}. Keep one row of each: every instruction counts once."
            )


def read_annotations(path: Path) -> Annotations:
    """One model's `annotations.json`, as alpaca_eval writes it.

    Raises:
        DataError: a row is not an annotated pair, has another baseline, model or annotator than the first row, or
            repeats an instruction. Names file and row.
    """
    rows = list(read_rows(str(path)))
    if not rows:
        raise DataError(f"{path} holds no annotated pairs")
    baseline, model, judge = _compared_models(rows[0])
    first: dict[str, Row] = {}
    for row in rows:
        if _compared_models(row) != (baseline, model, judge):
            raise DataError(
                f"{row.place}: {' / '.join(_compared_models(row))} stands in a file of {baseline} / {model} / {judge} "
                "(baseline / model / annotator). Give each its own file."
            )
        text = row.require("instruction", str)
        if first.setdefault(text, row) is not row:
            raise DataError(
                f"{row.place}: {quoted_start(text)} is annotated already, in {first[text].place}. Keep one."
            )
    return Annotations(
        baseline=baseline,
        model=model,
        judge=judge,
        instructions=list(first),
        preferences=[_preference(row) for row in rows],
        baseline_lengths=[len(row.require("output_1", str)) for row in rows],
        model_lengths=[len(row.require("output_2", str)) for row in rows],
    )


def _compared_models(row: Row) -> tuple[str, str, str]:
    """Baseline, model and judge; old files do not name the judge."""
    judge = row.require("annotator", str) if "annotator" in row.values else ""
    return row.require("generator_1", str), row.require("generator_2", str), judge


def _preference(row: Row) -> float | None:
    """The preference of a row, or 0 for an old draw; None where the judge's verdict could not be parsed."""
    return read_verdict_number(
        row, "preference", lowest=1.0, highest=2.0, marks=(0.0,), remedy="Add 1 to win probabilities."
    )


def preferences_as_probabilities(preferences: Sequence[float | None]) -> np.ndarray:
    """[N] probability in [0, 1] that the model wins, preference - 1; NaN where there is no preference.

    Args:
        preferences: [N] from 1 (the baseline is certainly better) to 2 (the model is certainly better). Old files write
            a draw as 0, which counts as 1.5. None and NaN mean that the verdict could not be parsed.

    Raises:
        DataError: a value is not a preference.
    """
    values = np.array([math.nan if value is None else value for value in preferences], dtype=float)
    values[values == 0.0] = 1.5
    [wrong] = np.nonzero((values < 1.0) | (values > 2.0))
    if wrong.size:
        raise DataError(
            f"preference {values[wrong[0]]:g} in row {wrong[0]} ({wrong.size} such rows): AlpacaEval's preferences run "
            "from 1 (baseline) to 2 (model), and 0 or 1.5 is a draw. Add 1 to win probabilities."
        )
    return values - 1.0


def quoted_start(text: str) -> str:
    """The first 60 characters of a text in quotes, for an error message."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
