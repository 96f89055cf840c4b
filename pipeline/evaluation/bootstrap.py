"""How far a number would move on other prompts of the same kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pipeline.errors import ShapeError
from pipeline.records import Metrics

Statistic = Callable[[np.ndarray], Metrics]
"""From row indices [n] (a row may come up more than once) to metrics of these rows."""

Intervals = dict[str, tuple[float, float]]

DRAWS = 1000
"""Enough for the ends of a 95% interval to stand still in the second digit of its width."""


def bootstrap_intervals(
    statistic: Statistic,
    groups: Sequence[str] | Sequence[int] | np.ndarray,
    *,
    seed: int,
    draws: int = DRAWS,
    level: float = 0.95,
) -> Intervals:
    """Percentile intervals of every metric, drawing whole groups of rows with replacement.

    Source: Efron 1979, "Bootstrap methods"; rows of one group (one prompt) are not independent, so they are
    drawn together. A metric that some draws do not have (no row of its subset came up) has the interval of the
    others; with one group alone nothing is known of its variation, and the ends are NaN.

    Args:
        statistic: of row indices.
        groups: [N] what each row belongs to.
        seed: the same seed gives the same draws, whatever the statistic.

    Raises:
        ShapeError: there are no rows.
    """
    if not len(groups):
        raise ShapeError("a bootstrap of no rows")
    _, first, code = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
    # Numbered as they first come up, so that the draws do not depend on what groups are called.
    codes = first.argsort().argsort()[code]
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
    return {name: _interval(np.array([metrics.get(name, np.nan) for metrics in drawn]), level) for name in names}


def difference(statistic: Statistic, other: Statistic) -> Statistic:
    """First minus second on the same rows: bootstrapped, it is the paired comparison of two models."""

    def of(rows: np.ndarray) -> Metrics:
        ours, theirs = statistic(rows), other(rows)
        return {name: ours[name] - theirs[name] for name in ours if name in theirs}

    return of


def _interval(values: np.ndarray, level: float) -> tuple[float, float]:
    known = values[~np.isnan(values)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [0.5 * (1.0 - level), 0.5 * (1.0 + level)])
    return float(low), float(high)
