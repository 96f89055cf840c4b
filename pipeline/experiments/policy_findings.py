"""Tables and sentences about finished alignments: the gold reward of each arm, and the difference of two arms."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.bootstrap import bootstrap_intervals
from pipeline.evaluation.pair_metrics import accuracy_metrics
from pipeline.experiments.findings import CELL, FinishedRun, Spread, by_variant, spread, spread_cell
from pipeline.experiments.grid import Experiment
from pipeline.records import Metrics

POLICY_CURVE_METRICS = (
    "reward/mean",
    "reward/zscore",
    "reward/posterior_std",
    "gold/mean",
    "gold/zscore",
    "gold/gap",
    "kl/per_response",
    "response/tokens",
)
"""Metrics that a run keeps of the rollouts of every step."""

SMOOTHING_STEPS = 5
"""Steps in the moving average of a curve. One step has only about a hundred responses."""

PRINTED_POLICY_COLUMNS = (
    "gold_start",
    "gold_end",
    "gold_win_rate",
    "gold_fall",
    "gap_growth",
    "kl",
    "reward_model_accuracy",
    "seconds",
)
CONTRASTED_COLUMNS = ("gap_growth", "gold_end", "gold_win_rate")
CONTRAST_WORDS = {
    "gap_growth": ("gap by seed", "the gap grows by", "sd more", "sd less"),
    "gold_end": ("gold by seed", "the gold reward ends", "higher", "lower"),
}
"""Column of `Experiment.contrasted` -> its name before the seeds, and the parts of its sentence."""

STAYS_UP_SHARE = 0.1
"""The gold reward "stayed up" if it lost at most this share of its largest gain."""


@dataclass(frozen=True, kw_only=True)
class ArmContrast:
    """One arm minus another, over the seeds that both have."""

    variant: str
    reference: str
    by_column: Mapping[str, Spread]


def moving_average(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """[steps] -> [steps - SMOOTHING_STEPS + 1] means of consecutive steps. A shorter curve has one mean."""
    size = min(SMOOTHING_STEPS, len(values))
    return np.convolve(values, np.full(size, 1.0 / size), mode="valid")


def fall_from_peak(values: Sequence[float]) -> float:
    """The maximum of the moving average minus its last value; at least 0."""
    averages = moving_average(values)
    return float(averages.max() - averages[-1])


def curves_csv(finished: Sequence[FinishedRun]) -> str:
    """One row per run and step: proxy and gold reward, their gap, KL."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["variant", "seed", "config_hash", "step", *POLICY_CURVE_METRICS])
    for f in finished:
        for point in f.result["curve"]:
            values = [f"{point[name]:.6g}" for name in POLICY_CURVE_METRICS]
            writer.writerow([f.run.variant.name, f.run.seed, f.run.config_hash, int(point["step"]), *values])
    return stream.getvalue()


def arm_contrasts(experiment: Experiment, finished: Sequence[FinishedRun]) -> list[ArmContrast]:
    """The experiment's contrasts whose two arms share a seed. A contrast pairs the runs of each seed."""
    runs = {(f.run.variant.name, f.run.seed): f for f in finished}
    contrasts = []
    for variant, reference in experiment.contrasts:
        seeds = [seed for name, seed in runs if name == variant and (reference, seed) in runs]
        if seeds:
            by_column = {
                column: spread([_value(runs[variant, s], column) - _value(runs[reference, s], column) for s in seeds])
                for column in CONTRASTED_COLUMNS
            }
            contrasts.append(ArmContrast(variant=variant, reference=reference, by_column=by_column))
    return contrasts


def gold_win_rate(runs: Sequence[FinishedRun]) -> tuple[float, float, float]:
    """(value, low, high): share of prompts on which the answer after alignment has the higher gold reward.

    A tie counts one half. The prompts are the held-out prompts of all runs together. The 95% interval resamples
    prompts, so it does not cover the variation with the seed.
    """
    margins = np.concatenate([f.result["margins"]["gold"] for f in runs])
    prompts = [prompt for f in runs for prompt in f.result["prompts"]]

    def statistic(rows: np.ndarray) -> Metrics:
        return {"win_rate": accuracy_metrics(margins[rows])["accuracy_tie_half"]}

    return statistic(np.arange(len(margins)))["win_rate"], *bootstrap_intervals(statistic, prompts, seed=0)["win_rate"]


def policy_findings_text(experiment: Experiment, finished: Sequence[FinishedRun]) -> str:
    """The table for a terminal, and sentences that interpret it."""
    spreads = {column: by_variant(finished, column) for column in PRINTED_POLICY_COLUMNS}
    names = list(dict.fromkeys(f.run.variant.name for f in finished))
    seeds = ", ".join(map(str, sorted({f.run.seed for f in finished})))
    contrasts = arm_contrasts(experiment, finished)
    width = max(len(name) for name in [*names, *(_label(c) for c in contrasts)]) + 2
    heads = [column.replace("_", " ").replace("reward model", "RM") for column in PRINTED_POLICY_COLUMNS]
    lines = [
        f"{experiment.title}. {experiment.question}",
        f"{len(finished)} runs, seeds {seeds}; mean over seeds +- 95% t interval",
        "gold: mean planted reward, 1 to 5; gap: reward minus gold, each in sd of held-out responses; "
        "KL: nats a response",
        "",
        " " * width + "".join(f"{head:>{CELL}}" for head in heads),
    ]
    lines += [
        f"{name:<{width}}"
        + "".join(f"{spread_cell(spreads[column].get(name), column):>{CELL}}" for column in PRINTED_POLICY_COLUMNS)
        for name in names
    ]
    if contrasts:
        heads = [column.replace("_", " ") for column in CONTRASTED_COLUMNS]
        lines += ["", "differences, seed by seed", " " * width + "".join(f"{head:>28}" for head in heads)]
        for c in contrasts:
            intervals = "".join(f"{_spread_text(c.by_column[column]):>28}" for column in CONTRASTED_COLUMNS)
            by_seed = " ".join(f"{value:+.2f}" for value in c.by_column[experiment.contrasted].values)
            lines.append(f"{_label(c):<{width}}{intervals}   {CONTRAST_WORDS[experiment.contrasted][0]} {by_seed}")
    lines += ["", *(_rise_sentence(name, finished) for name in names)]
    lines += [_contrast_sentence(contrast, experiment.contrasted) for contrast in contrasts]
    return "\n".join(line.rstrip() for line in lines)


def _rise_sentence(name: str, finished: Sequence[FinishedRun]) -> str:
    """A sentence: in how many seeds the gold reward rose, and in how many it stayed up."""
    runs = [f for f in finished if f.run.variant.name == name]
    rose = [_value(f, "gold_end") > _value(f, "gold_start") for f in runs]
    stayed = [
        up and _value(f, "gold_fall") <= STAYS_UP_SHARE * _largest_gain(f) for f, up in zip(runs, rose, strict=True)
    ]
    start, end = (spread([_value(f, column) for f in runs]).mean for column in ("gold_start", "gold_end"))
    rate, low, high = gold_win_rate(runs)
    return (
        f"{name}: the gold reward goes from {start:.2f} to {end:.2f}; it rose in {sum(rose)} and stayed up in "
        f"{sum(stayed)} of {len(runs)} seeds. {rate:.0%} [{low:.0%}, {high:.0%}] of the answers beat the start's."
    )


def _largest_gain(f: FinishedRun) -> float:
    """Largest gain of the gold reward over the start: the gain at the end plus the fall from the peak."""
    return _value(f, "gold_end") - _value(f, "gold_start") + _value(f, "gold_fall")


def _contrast_sentence(contrast: ArmContrast, column: str) -> str:
    difference = contrast.by_column[column]
    _, subject, more, less = CONTRAST_WORDS[column]
    caveat = "" if _excludes_zero(difference) else ", which these seeds do not tell from 0"
    if len(difference.values) == 1:
        caveat = ", in one seed"
    return (
        f"{contrast.variant}: {subject} {abs(difference.mean):.2f} {more if difference.mean > 0 else less} than "
        f"with {contrast.reference}{caveat}."
    )


def _value(f: FinishedRun, column: str) -> float:
    value = f.value(column)
    assert value is not None, column
    return value


def _label(contrast: ArmContrast) -> str:
    return f"{contrast.variant} minus {contrast.reference}"


def _excludes_zero(spread: Spread) -> bool:
    return not math.isnan(spread.low) and (spread.low > 0 or spread.high < 0)


def _spread_text(spread: Spread) -> str:
    if math.isnan(spread.low):
        return f"{spread.mean:+.3f} "
    return f"{spread.mean:+.3f} [{spread.low:+.3f}, {spread.high:+.3f}]{'*' if _excludes_zero(spread) else ' '}"
