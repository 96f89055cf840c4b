"""Learning curves of a comparison of methods: the mean over seeds at every step that measured something."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from pipeline.experiments.findings import FinishedRun
from pipeline.reporting.axis_style import style_axis

CURVES = {
    "eval/accuracy": "held-out accuracy of the implied reward",
    "eval/loss": "held-out loss of the method",
    "eval/change_rms": "rms change of held-out log-probabilities (nats)",
    "gold/mean": "gold reward of rollouts",
    "reward/zscore": "reward of rollouts (sd)",
    "kl/per_response": "KL of rollouts (nats a response)",
}
"""The first three are those of direct alignment, the others those of PPO."""

OF_ONE_METHOD = {"eval/loss"}
"""Metrics whose size differs between methods by tens, so that one axis must be logarithmic."""


def write_learning_curves(finished: Sequence[FinishedRun], path: Path) -> None:
    """One panel a metric, one line a method; metrics that nobody measured have no panel."""
    known = [metric for metric in CURVES if any(metric in point for f in finished for point in f.result["curve"])]
    methods = list(dict.fromkeys(f.run.variant.name for f in finished))
    columns = min(3, max(1, len(known)))
    rows = -(-max(1, len(known)) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.3 * rows), squeeze=False, layout="constrained")
    colours = plt.get_cmap("tab10")
    for axis, metric in zip(axes.flat, known, strict=False):
        for number, method in enumerate(methods):
            runs = [f for f in finished if f.run.variant.name == method]
            _draw(axis, runs, metric, colour=colours(number % 10), label=method)
        axis.set_xlabel("optimiser step, or step of PPO", fontsize=8)
        axis.set_yscale("log" if metric in OF_ONE_METHOD else "linear")
        style_axis(axis, CURVES[metric])
    for unused in list(axes.flat)[len(known) :]:
        unused.set_visible(False)
    seeds = ", ".join(map(str, sorted({f.run.seed for f in finished})))
    figure.suptitle(f"Learning curves (recipe {finished[0].run.recipe.name}, seeds {seeds}, mean)", fontsize=9)
    lines = {line.get_label(): line for axis in axes.flat for line in axis.lines}
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=len(methods), frameon=False, fontsize=8
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw(axis: Axes, runs: Sequence[FinishedRun], metric: str, *, colour: object, label: str) -> None:
    """The mean over the seeds that measured the metric, over the steps that all of them have."""
    curves = [{point["step"]: point[metric] for point in f.result["curve"] if metric in point} for f in runs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    if steps:
        mean = np.mean([[curve[step] for step in steps] for curve in curves], axis=0)
        axis.plot(steps, mean, color=colour, linewidth=1.3, label=label, marker="o" if len(steps) < 3 else "")
