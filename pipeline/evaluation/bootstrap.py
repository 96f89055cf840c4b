"""Bootstrap intervals: how much a number varies with the prompts it is measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pipeline.errors import ShapeError
from pipeline.records import Metrics

Statistic = Callable[[np.ndarray], Metrics]
"""Row indices [n] -> metrics of these rows. An index may occur more than once."""

Intervals = dict[str, tuple[float, float]]

DRAWS = 1000
"""Enough draws to fix the ends of a 95% interval to the second digit of its width."""


def bootstrap_intervals(
    statistic: Statistic,
    groups: Sequence[str] | Sequence[int] | np.ndarray,
    *,
    seed: int,
    draws: int = DRAWS,
    level: float = 0.95,
) -> Intervals:
    """Percentile intervals of every metric, from draws of whole groups of rows with replacement.

    Source: Efron 1979, "Bootstrap methods". Rows of one group (one prompt) are not independent, so they are drawn
    together. Some draws may lack a metric, because they hold no row of its subset; its interval uses the other draws.
    With a single group, the variation is unknown and the ends are NaN.

    Args:
        statistic: computes the metrics of given row indices.
        groups: [N] group of each row.
        seed: equal seeds give equal draws, for any statistic.

    Raises:
        ShapeError: there are no rows.
    """
    if not len(groups):
        raise ShapeError("a bootstrap of no rows")
    # Groups are numbered by their names, so the draws do not depend on the order of the rows.
    codes = np.unique(np.asarray(groups), return_inverse=True)[1]
    rows, sizes = codes.argsort(kind="stable"), np.bincount(codes)
    starts = sizes.cumsum() - sizes
    names = statistic(np.arange(len(codes)))
    if len(sizes) == 1:
        return dict.fromkeys(names, (float("nan"), float("nan")))
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        group = rng.integers(len(sizes), size=len(sizes))
        size = sizes[group]
        # Where each drawn group begins in `rows`, minus where it lands in the draw.
        offsets = np.repeat(starts[group] - (size.cumsum() - size), size)
        drawn.append(statistic(rows[offsets + np.arange(len(offsets))]))
    return {
        name: _percentile_interval(np.array([metrics.get(name, np.nan) for metrics in drawn]), level) for name in names
    }


def difference_of_statistics(statistic: Statistic, other: Statistic) -> Statistic:
    """First minus second on the same rows. Its bootstrap interval is that of a paired comparison."""

    def differences(rows: np.ndarray) -> Metrics:
        first, second = statistic(rows), other(rows)
        return {name: first[name] - second[name] for name in first if name in second}

    return differences


def _percentile_interval(values: np.ndarray, level: float) -> tuple[float, float]:
    known = values[~np.isnan(values)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [0.5 * (1.0 - level), 0.5 * (1.0 + level)])
    return float(low), float(high)
