"""One chart of curves over training steps, as the numbers of an SVG drawing. The template draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pipeline.reporting.report_data import MetricsRow

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 24
"""Margins around the curves, in units of the drawing. About one pixel each on a screen of any width."""

FEWEST_SMOOTHED = 12
"""A curve of fewer points is drawn as it is."""


class Series(NamedTuple):
    """One metric of a chart."""

    metric: str
    label: str
    """In the legend."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What one chart shows."""

    title: str
    """With the unit."""
    first: Series | None = None
    second: Series | None = None
    """Where there are two, that of held-out data."""
    healthy: str
    """What healthy curves look like, in one sentence or two."""


class Place(NamedTuple):
    """A point of the drawing."""

    x: float
    y: float


class Whisker(NamedTuple):
    """The 95% interval of a point."""

    x: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class DrawnSeries:
    """One curve in units of the drawing."""

    place: Literal["first", "second"]
    """Of the series in its chart: its colour."""
    legend: str
    raw: Sequence[Place]
    smooth: Sequence[Place]
    """Empty for a curve that is drawn as it is."""
    whiskers: Sequence[Whisker]


@dataclass(frozen=True, kw_only=True)
class DrawnChart:
    """A chart in units of the drawing."""

    chart: Chart
    series: Sequence[DrawnSeries]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]

    @property
    def description(self) -> str:
        """For those who do not see it."""
        return f"{self.chart.title}, over steps. " + ". ".join(series.legend for series in self.series)


def draw_charts(charts: Sequence[Chart], rows: Sequence[MetricsRow]) -> list[DrawnChart]:
    """The charts of which `rows` have any number."""
    return [drawn for chart in charts if (drawn := _draw(chart, rows)) is not None]


def smoothing_window(count: int) -> int:
    """How many neighbouring points the smooth curve takes the mean of: an odd number, about a tenth of them; else 1."""
    return 1 if count < FEWEST_SMOOTHED else max(3, 2 * round(count / 20) + 1)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean of `window` values around each one; of as many on both sides as there are, near an end."""
    means = []
    for i in range(len(values)):
        reach = min(window // 2, i, len(values) - 1 - i)
        around = values[i - reach : i + reach + 1]
        means.append(sum(around) / len(around))
    return means


def ticks(low: float, high: float, *, most: int, whole: bool = False) -> list[tuple[float, str]]:
    """At most `most` + 1 round numbers from `low` to `high`, with their labels.

    Args:
        whole: integers alone.
    """
    least = (high - low) / most
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    step = max(1.0, step) if whole else step
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    places = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(k * step, _label(round(k * step, decimals), decimals)) for k in places]


def _label(value: float, decimals: int) -> str:
    return f"{value:g}" if decimals > 4 else f"{value:,.{decimals}f}"


def _draw(chart: Chart, rows: Sequence[MetricsRow]) -> DrawnChart | None:
    measured = [series for series in (chart.first, chart.second) if series is not None and _curve(rows, series.metric)]
    if not measured:
        return None
    curves = [_curve(rows, series.metric) for series in measured]
    intervals = [_intervals(rows, series.metric) for series in measured]
    steps = [step for curve in curves for step in curve]
    first, last = min(steps), max(max(steps), min(steps) + 1)
    heights = [value for curve in curves for value in curve.values()]
    heights += [end for ends in intervals for interval in ends.values() for end in interval]
    low, high = _padded(min(heights), max(heights))

    def x(step: float) -> float:
        return round(LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    drawn = []
    for series, curve, ends in zip(measured, curves, intervals, strict=True):
        window = smoothing_window(len(curve))
        means = smoothed(list(curve.values()), window) if window > 1 else []
        drawn.append(
            DrawnSeries(
                place="first" if series is chart.first else "second",
                legend=_legend(series.label, curve, window),
                raw=[Place(x(step), y(value)) for step, value in curve.items()],
                smooth=[Place(x(step), y(mean)) for step, mean in zip(curve, means, strict=bool(means))],
                whiskers=[Whisker(x(step), y(a), y(b)) for step, (a, b) in ends.items()],
            )
        )
    return DrawnChart(
        chart=chart,
        series=drawn,
        x_ticks=[(x(step), label) for step, label in ticks(first, last, most=5, whole=True)],
        y_ticks=[(y(value), label) for value, label in ticks(low, high, most=4)],
    )


def _curve(rows: Sequence[MetricsRow], name: str) -> dict[int, float]:
    """Step, counted from 1 -> value. A step may have several rows; the last one that knows the metric counts."""
    return {row["step"] + 1: float(row[name]) for row in rows if _is_number(row.get(name))}


def _intervals(rows: Sequence[MetricsRow], name: str) -> dict[int, tuple[float, float]]:
    low, high = (_curve(rows, f"{name}_{end}") for end in ("low", "high"))
    return {step: (low[step], high[step]) for step in low if step in high}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _legend(label: str, curve: dict[int, float], window: int) -> str:
    step, value = list(curve.items())[-1]
    smoothing = f" (thick: mean of {window} steps)" if window > 1 else ""
    return f"{label}: {value:.4g} at step {step:,}{smoothing}"
