"""Figures of an experiment: one point per seed, and the mean over seeds with its interval."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.experiments.findings import FinishedRun, Spread, by_variant
from pipeline.experiments.grid import NO_KL, Experiment, Variant
from pipeline.experiments.policy_findings import moving_average
from pipeline.reporting.axis_style import style_axis

COLOURS = ("#2563a8", "#d9772b", "#3a8f5c", "#8b5fbf", "#b0413e", "#6b7280")
COLUMN_TITLES = {
    "accuracy": "held-out accuracy",
    "nll": "held-out NLL (nats)",
    "ece": "calibration error",
    "margin": "mean |margin|",
    "kl_w": "KL of the weights (nats a pair)",
    "kl_z": "KL of the features (nats a pair)",
    "active_units": "active semantic units",
    "weight_correlation": "correlation with planted weights",
    "supervision": "held-out supervision loss",
    "gold_win_rate": "gold win rate against the start, held out",
    "gap_growth": "growth of the gold-proxy gap, held out (sd)",
}
OVER_OPTIMISATION = {
    "reward/zscore": "reward of the model (sd)",
    "gold/zscore": "gold reward (sd)",
}
"""Curves drawn against KL, in standard deviations of held-out responses."""
CURVES_AGAINST = {
    "kl": ("kl/per_response", "KL to the start, nats a response", OVER_OPTIMISATION),
    "step": ("step", "PPO step", {"gold/mean": "gold reward, 1 to 5", "reward/zscore": "reward of the model (sd)"}),
}
"""`Experiment.curves_against` -> metric of the horizontal axis, its label, curves with their titles."""
POLICY_CURVES = OVER_OPTIMISATION | {
    "gold/gap": "gold-proxy gap (sd)",
    "kl/per_response": "KL to the start (nats a response)",
    "reward/posterior_std": "sd of the model's reward",
    "response/tokens": "response tokens",
}
REWARD_CURVES = {
    "train/accuracy": "training accuracy (one batch)",
    "eval/accuracy": "held-out accuracy",
    "eval/supervision": "held-out supervision loss",
}


def write_figures(name: str, experiment: Experiment, finished: Sequence[FinishedRun], directory: Path) -> list[Path]:
    """Writes `<name>.png`, one panel per column, and `<name>_curves.png`, learning curves; returns both paths."""
    written = [directory / f"{name}.png", directory / f"{name}_curves.png"]
    figures = (
        (_reward_against(experiment, finished), _policy_curves(experiment, finished))
        if experiment.trains == "policy"
        else (_reward_panels(experiment, finished), _reward_curves(experiment, finished))
    )
    for path, figure in zip(written, figures, strict=True):
        figure.savefig(path, dpi=130)
        plt.close(figure)
    return written


def _reward_panels(experiment: Experiment, finished: Sequence[FinishedRun]) -> Figure:
    known = {column: spreads for column in experiment.panels if (spreads := by_variant(finished, column))}
    figure, axes = _grid(len(known))
    for axis, (column, spreads) in zip(axes, known.items(), strict=True):
        if experiment.axis is None:
            names = [variant.name for variant in experiment.variants]
            _by_name(axis, dict(zip(names, itertools.cycle(COLOURS), strict=False)), spreads)
        else:
            _by_number(axis, experiment, spreads)
        if column == "nll":
            axis.axhline(np.log(2), color="#9aa1ab", linewidth=0.8, linestyle=":")
        if column == "accuracy":
            baseline = by_variant(finished, "longer_is_better")
            if baseline:
                level = float(np.mean([s.mean for s in baseline.values()]))
                axis.set_xlabel(f"{axis.get_xlabel()}\nlonger is better: {level:.3f}".strip(), fontsize=8)
        style_axis(axis, COLUMN_TITLES[column])
    return _finished(figure, experiment, finished)


def _by_name(axis: Axes, colours: Mapping[str, str], spreads: Mapping[str, Spread]) -> None:
    """Draws the spreads by name. Each name of `colours` has the same place in every panel."""
    for place, (name, colour) in enumerate(colours.items()):
        if name not in spreads:
            continue
        found = spreads[name]
        axis.scatter([place] * len(found.values), found.values, s=16, color=colour, alpha=0.6, linewidths=0)
        axis.errorbar(place + 0.2, found.mean, yerr=_half(found), fmt="_", markersize=12, color=colour, capsize=3)
    crowded = len(colours) > 5
    axis.set_xticks(
        range(len(colours)), list(colours), rotation=35 if crowded else 0, ha="right" if crowded else "center"
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


def _reward_curves(experiment: Experiment, finished: Sequence[FinishedRun]) -> Figure:
    """Mean over seeds at every evaluated step."""
    figure, axes = _grid(len(REWARD_CURVES))
    cycle = plt.get_cmap("viridis")(np.linspace(0.0, 0.9, len(experiment.variants)))
    for axis, (metric, title) in zip(axes, REWARD_CURVES.items(), strict=True):
        for variant, colour in zip(experiment.variants, cycle, strict=True):
            curves = [f.result["curve"] for f in finished if f.run.variant == variant]
            steps = [point["step"] for point in curves[0] if metric in point] if curves else []
            if not steps:
                continue
            values = [[point[metric] for point in curve if metric in point] for curve in curves]
            axis.plot(steps, np.mean(values, axis=0), color=colour, linewidth=1.3, label=variant.name)
        axis.set_xlabel("step", fontsize=8)
        style_axis(axis, title)
    axes[1].legend(frameon=False, fontsize=7)
    return _finished(figure, experiment, finished)


def _reward_against(experiment: Experiment, finished: Sequence[FinishedRun]) -> Figure:
    """Reward and gold reward against KL (Gao et al. 2022, arXiv:2210.10760, Fig. 1) or PPO steps, and the final values.

    Thin lines are seeds, thick ones their mean; all are moving averages.
    """
    horizontal, label, shown = CURVES_AGAINST[experiment.curves_against]
    spreads = {column: by_variant(finished, column) for column in experiment.panels}
    figure, axes = _grid(len(shown) + len(spreads), columns=2)
    curve_axes, ends = axes[: len(shown)], axes[len(shown) :]
    for axis, (metric, title) in zip(curve_axes, shown.items(), strict=True):
        for variant, curves in _arms(experiment, finished):
            style = _arm_style(experiment, variant)
            for curve in curves:
                axis.plot(
                    moving_average(curve[horizontal]),
                    moving_average(curve[metric]),
                    **style | {"alpha": 0.25, "lw": 0.8},
                )
            x, reward = (np.mean([moving_average(curve[m]) for curve in curves], axis=0) for m in (horizontal, metric))
            axis.plot(x, reward, **style, label=variant.name)
            axis.plot(x[-1:], reward[-1:], **style | {"marker": "o", "markersize": 4})
        axis.set_xlabel(label, fontsize=8)
        style_axis(axis, title)
    if experiment.curves_against == "kl":
        _share_y(curve_axes)
    curve_axes[0].legend(frameon=False, fontsize=7)
    for axis, (column, found) in zip(ends, spreads.items(), strict=True):
        colours = {v.name: _arm_style(experiment, v)["color"] for v in experiment.variants if v.name in found}
        _by_name(axis, colours, found)
        axis.axhline(0.5 if column == "gold_win_rate" else 0.0, color="#9aa1ab", linewidth=0.8, linestyle=":")
        style_axis(axis, COLUMN_TITLES[column])
    return _finished(figure, experiment, finished)


def _policy_curves(experiment: Experiment, finished: Sequence[FinishedRun]) -> Figure:
    """Moving average of the mean over seeds at every step."""
    figure, axes = _grid(len(POLICY_CURVES))
    for axis, (metric, title) in zip(axes, POLICY_CURVES.items(), strict=True):
        for variant, curves in _arms(experiment, finished):
            steps = moving_average(curves[0]["step"])
            mean = np.mean([moving_average(curve[metric]) for curve in curves], axis=0)
            axis.plot(steps, mean, **_arm_style(experiment, variant), label=variant.name)
        axis.set_xlabel("step", fontsize=8)
        style_axis(axis, title)
    _share_y(axes[:2])
    axes[0].legend(frameon=False, fontsize=7)
    return _finished(figure, experiment, finished)


def _arms(
    experiment: Experiment, finished: Sequence[FinishedRun]
) -> Iterator[tuple[Variant, list[dict[str, np.ndarray]]]]:
    """Every arm that has a run, with one set of curves per seed; curves are name -> [steps]."""
    for variant in experiment.variants:
        curves = [f.result["curve"] for f in finished if f.run.variant == variant]
        if curves:
            yield variant, [{name: np.array([point[name] for point in curve]) for name in curve[0]} for curve in curves]


def _arm_style(experiment: Experiment, variant: Variant) -> dict[str, Any]:
    """One colour per arm; dashed without a KL penalty."""
    series = list(dict.fromkeys(v.series for v in experiment.variants))
    free = variant.name.endswith(NO_KL)
    return {"color": COLOURS[series.index(variant.series)], "linestyle": "--" if free else "-", "lw": 1.4}


def _share_y(axes: Sequence[Axes]) -> None:
    limits = [axis.get_ylim() for axis in axes]
    for axis in axes:
        axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _grid(count: int, *, columns: int = 3) -> tuple[Figure, list[Axes]]:
    columns = min(columns, max(1, count))
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
    """Half the width of the interval; 0 for a single seed."""
    return 0.0 if np.isnan(found.high) else found.high - found.mean
