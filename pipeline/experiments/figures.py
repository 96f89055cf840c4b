"""Figures of an experiment: every seed a point, the mean over seeds with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.experiments.findings import FinishedRun, Spread, by_variant
from pipeline.experiments.grid import Experiment, Variant

COLOURS = ("#2563a8", "#d9772b", "#3a8f5c", "#8b5fbf", "#b0413e", "#6b7280")
TITLES = {
    "accuracy": "held-out accuracy",
    "nll": "held-out NLL (nats)",
    "ece": "calibration error",
    "margin": "mean |margin|",
    "kl_w": "KL of the weights (nats a pair)",
    "kl_z": "KL of the features (nats a pair)",
    "active_units": "active semantic units",
    "weight_correlation": "correlation with planted weights",
    "supervision": "held-out supervision loss",
}
CURVES = {
    "train/accuracy": "training accuracy (one batch)",
    "eval/accuracy": "held-out accuracy",
    "eval/supervision": "held-out supervision loss",
}


def write_figures(name: str, experiment: Experiment, finished: Sequence[FinishedRun], directory: Path) -> list[Path]:
    """`<name>.png`, a panel per column, and `<name>_curves.png`, learning curves. Returns what it wrote."""
    written = [directory / f"{name}.png", directory / f"{name}_curves.png"]
    for path, figure in zip(written, (_panels(experiment, finished), _curves(experiment, finished)), strict=True):
        figure.savefig(path, dpi=130)
        plt.close(figure)
    return written


def _panels(experiment: Experiment, finished: Sequence[FinishedRun]) -> Figure:
    known = {column: spreads for column in experiment.panels if (spreads := by_variant(finished, column))}
    figure, axes = _grid(len(known))
    for axis, (column, spreads) in zip(axes, known.items(), strict=True):
        if experiment.axis is None:
            _by_name(axis, [v.name for v in experiment.variants if v.name in spreads], spreads)
        else:
            _by_number(axis, experiment, spreads)
        if column == "nll":
            axis.axhline(np.log(2), color="#9aa1ab", linewidth=0.8, linestyle=":")
        if column == "accuracy":
            baseline = by_variant(finished, "longer_is_better")
            if baseline:
                level = float(np.mean([s.mean for s in baseline.values()]))
                axis.set_xlabel(f"{axis.get_xlabel()}\nlonger is better: {level:.3f}".strip(), fontsize=8)
        _style(axis, TITLES[column])
    return _finished(figure, experiment, finished)


def _by_name(axis: Axes, names: Sequence[str], spreads: dict[str, Spread]) -> None:
    for place, name in enumerate(names):
        found = spreads[name]
        colour = COLOURS[place % len(COLOURS)]
        axis.scatter([place] * len(found.values), found.values, s=16, color=colour, alpha=0.6, linewidths=0)
        axis.errorbar(place + 0.2, found.mean, yerr=_half(found), fmt="_", markersize=12, color=colour, capsize=3)
    axis.set_xticks(
        range(len(names)), names, rotation=35 if len(names) > 5 else 0, ha="right" if len(names) > 5 else "center"
    )


def _by_number(axis: Axes, experiment: Experiment, spreads: dict[str, Spread]) -> None:
    series: dict[str, list[Variant]] = {}
    for variant in experiment.variants:
        if variant.name in spreads:
            series.setdefault(variant.series, []).append(variant)
    for colour, (label, variants) in zip(COLOURS, series.items(), strict=False):
        x = np.array([float(variant.x or 0.0) for variant in variants])
        found = [spreads[variant.name] for variant in variants]
        for place, one in zip(x, found, strict=True):
            axis.scatter([place] * len(one.values), one.values, s=14, color=colour, alpha=0.55, linewidths=0)
        mean = np.array([one.mean for one in found])
        axis.plot(x, mean, color=colour, linewidth=1.4, label=label)
        half = np.array([_half(one) for one in found])
        axis.fill_between(x, mean - half, mean + half, color=colour, alpha=0.12, linewidth=0)
    if experiment.log_axis:
        axis.set_xscale("log")
    axis.set_xlabel(experiment.axis or "", fontsize=8)
    if len(series) > 1:
        axis.legend(frameon=False, fontsize=8)


def _curves(experiment: Experiment, finished: Sequence[FinishedRun]) -> Figure:
    """Mean over seeds at every evaluated step."""
    figure, axes = _grid(len(CURVES))
    cycle = plt.get_cmap("viridis")(np.linspace(0.0, 0.9, len(experiment.variants)))
    for axis, (metric, title) in zip(axes, CURVES.items(), strict=True):
        for variant, colour in zip(experiment.variants, cycle, strict=True):
            curves = [f.result["curve"] for f in finished if f.run.variant == variant]
            steps = [point["step"] for point in curves[0] if metric in point] if curves else []
            if not steps:
                continue
            values = [[point[metric] for point in curve if metric in point] for curve in curves]
            axis.plot(steps, np.mean(values, axis=0), color=colour, linewidth=1.3, label=variant.name)
        axis.set_xlabel("step", fontsize=8)
        _style(axis, title)
    axes[1].legend(frameon=False, fontsize=7)
    return _finished(figure, experiment, finished)


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(3, max(1, count))
    rows = -(-max(1, count) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.3 * rows), squeeze=False)
    for unused in axes.flat[count:]:
        unused.set_visible(False)
    return figure, list(axes.flat[:count])


def _finished(figure: Figure, experiment: Experiment, finished: Sequence[FinishedRun]) -> Figure:
    seeds = ", ".join(map(str, sorted({f.run.seed for f in finished})))
    recipe = finished[0].run.recipe.name
    figure.suptitle(
        f"{experiment.title}  (recipe {recipe}, seeds {seeds}; points are seeds, bars 95% of the mean)", fontsize=9
    )
    figure.tight_layout()
    return figure


def _half(found: Spread) -> float:
    """Half the interval; 0 for a single seed."""
    return 0.0 if np.isnan(found.high) else found.high - found.mean


def _style(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(axis="y", color="#e6e8eb")
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
