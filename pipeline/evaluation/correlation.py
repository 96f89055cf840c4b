"""Pearson's correlation coefficient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SMALLEST_NORM = 1e-12
"""Below this product of norms, the variation is rounding error."""


def pearson_correlation(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """rho = sum_i (x_i - mean x) (y_i - mean y) / (|x - mean x| |y - mean y|); NaN where x or y does not vary.

    Args:
        x, y: [N].
    """
    if not len(x):
        return math.nan
    dx, dy = np.asarray(x, dtype=np.float64) - np.mean(x), np.asarray(y, dtype=np.float64) - np.mean(y)
    norm = float(np.linalg.norm(dx) * np.linalg.norm(dy))
    return float(dx @ dy) / norm if norm > SMALLEST_NORM else math.nan


def correlation_or_zero(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """`pearson_correlation`, or 0 where x or y does not vary."""
    correlation = pearson_correlation(x, y)
    return 0.0 if math.isnan(correlation) else correlation
