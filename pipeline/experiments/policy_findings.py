"""From finished alignments to tables and words: what the truth thinks of each arm, and what sets two arms apart."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.bootstrap import bootstrap_intervals
from pipeline.evaluation.pair_metrics import pair_accuracy
from pipeline.experiments.findings import CELL, FinishedRun, Spread, by_variant, cell, spread
from pipeline.experiments.grid import Experiment
from pipeline.records import Metrics

ALIGNMENT_CURVES = (
    "reward/mean",
    "reward/zscore",
    "reward/posterior_std",
    "gold/mean",
    "gold/zscore",
    "gold/gap",
    "kl/per_response",
    "response/tokens",
)
"""What a run keeps of the rollouts of every step."""

WINDOW = 5
"""Steps averaged before a curve is said to rise or fall: a step is a hundred responses or so."""

PRINTED = (
    "gold_start",
    "gold_end",
    "gold_win_rate",
    "gold_fall",
    "gap_growth",
    "kl",
    "reward_model_accuracy",
    "seconds",
)
CONTRASTED = ("gap_growth", "gold_end", "gold_win_rate")

STAYS_UP = 0.1
"""A gold reward that ends within this share of what it had won at its best has stayed up."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """One arm minus another, on the seeds that both have."""

    variant: str
    reference: str
    by_column: Mapping[str, Spread]


def moving_average(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """[steps] -> [steps - WINDOW + 1] means of `WINDOW` consecutive steps; a shorter curve becomes its one mean."""
    size = min(WINDOW, len(values))
    return np.convolve(values, np.full(size, 1.0 / size), mode="valid")


def fall_from_peak(values: Sequence[float]) -> float:
    """By how much the moving average ends below its highest; 0 where it ends highest."""
    averages = moving_average(values)
    return float(averages.max() - averages[-1])


def curves_csv(finished: Sequence[FinishedRun]) -> str:
    """One row per run and step: proxy and gold reward, their gap, KL."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["variant", "seed", "config_hash", "step", *ALIGNMENT_CURVES])
    for f in finished:
        for point in f.result["curve"]:
            values = [f"{point[name]:.6g}" for name in ALIGNMENT_CURVES]
            writer.writerow([f.run.variant.name, f.run.seed, f.run.config_hash, int(point["step"]), *values])
    return stream.getvalue()


def contrasts(experiment: Experiment, finished: Sequence[FinishedRun]) -> list[Contrast]:
    """Those of the experiment whose two arms have a seed in common; a contrast pairs the runs of each seed."""
    runs = {(f.run.variant.name, f.run.seed): f for f in finished}
    found = []
    for variant, reference in experiment.contrasts:
        seeds = [seed for name, seed in runs if name == variant and (reference, seed) in runs]
        if seeds:
            by_column = {
                column: spread([_of(runs[variant, s], column) - _of(runs[reference, s], column) for s in seeds])
                for column in CONTRASTED
            }
            found.append(Contrast(variant=variant, reference=reference, by_column=by_column))
    return found


def gold_win_rate(runs: Sequence[FinishedRun]) -> tuple[float, float, float]:
    """(value, low, high): how often the truth prefers the answer after alignment to the one before, a tie one half.

    Over the held-out prompts of all runs together; the 95% interval draws prompts, so it says nothing of other seeds.
    """
    margins = np.concatenate([f.result["margins"]["gold"] for f in runs])
    prompts = [prompt for f in runs for prompt in f.result["prompts"]]

    def won(rows: np.ndarray) -> Metrics:
        return {"win_rate": pair_accuracy(margins[rows])["accuracy_tie_half"]}

    return won(np.arange(len(margins)))["win_rate"], *bootstrap_intervals(won, prompts, seed=0)["win_rate"]


def policies_in_words(experiment: Experiment, finished: Sequence[FinishedRun]) -> str:
    """The table for a terminal, and what it says."""
    spreads = {column: by_variant(finished, column) for column in PRINTED}
    names = list(dict.fromkeys(f.run.variant.name for f in finished))
    seeds = ", ".join(map(str, sorted({f.run.seed for f in finished})))
    found = contrasts(experiment, finished)
    width = max(len(name) for name in [*names, *(_named(c) for c in found)]) + 2
    heads = [column.replace("_", " ").replace("reward model", "RM") for column in PRINTED]
    lines = [
        f"{experiment.title}. {experiment.question}",
        f"{len(finished)} runs, seeds {seeds}; mean over seeds +- 95% t interval",
        "gold: mean planted reward, 1 to 5; gap: reward minus gold, each in sd of held-out responses; "
        "KL: nats a response",
        "",
        " " * width + "".join(f"{head:>{CELL}}" for head in heads),
    ]
    lines += [
        f"{name:<{width}}" + "".join(f"{cell(spreads[column].get(name), column):>{CELL}}" for column in PRINTED)
        for name in names
    ]
    if found:
        heads = [column.replace("_", " ") for column in CONTRASTED]
        lines += ["", "differences, seed by seed", " " * width + "".join(f"{head:>28}" for head in heads)]
        for c in found:
            told = "".join(f"{_interval(c.by_column[column]):>28}" for column in CONTRASTED)
            by_seed = " ".join(f"{value:+.2f}" for value in c.by_column["gap_growth"].values)
            lines.append(f"{_named(c):<{width}}{told}   gap by seed {by_seed}")
    lines += ["", *(_rise_in_words(name, finished) for name in names), *map(_contrast_in_words, found)]
    return "\n".join(line.rstrip() for line in lines)


def _rise_in_words(name: str, finished: Sequence[FinishedRun]) -> str:
    """Whether the gold reward rose, and whether it stayed up, in how many of the seeds."""
    runs = [f for f in finished if f.run.variant.name == name]
    rose = [_of(f, "gold_end") > _of(f, "gold_start") for f in runs]
    stayed = [up and _of(f, "gold_fall") <= STAYS_UP * _won_at_best(f) for f, up in zip(runs, rose, strict=True)]
    start, end = (spread([_of(f, column) for f in runs]).mean for column in ("gold_start", "gold_end"))
    rate, low, high = gold_win_rate(runs)
    return (
        f"{name}: the gold reward goes from {start:.2f} to {end:.2f}; it rose in {sum(rose)} and stayed up in "
        f"{sum(stayed)} of {len(runs)} seeds. {rate:.0%} [{low:.0%}, {high:.0%}] of the answers beat the start's."
    )


def _won_at_best(f: FinishedRun) -> float:
    """Gold reward above the start when it was highest: what is left at the end, and what was lost since."""
    return _of(f, "gold_end") - _of(f, "gold_start") + _of(f, "gold_fall")


def _contrast_in_words(contrast: Contrast) -> str:
    gap = contrast.by_column["gap_growth"]
    more = "more" if gap.mean > 0 else "less"
    sure = "" if _excludes_zero(gap) else ", which these seeds do not tell from 0"
    if len(gap.values) == 1:
        sure = ", in one seed"
    return f"{contrast.variant}: the gap grows by {abs(gap.mean):.2f} sd {more} than with {contrast.reference}{sure}."


def _of(f: FinishedRun, column: str) -> float:
    value = f.value(column)
    assert value is not None, column
    return value


def _named(contrast: Contrast) -> str:
    return f"{contrast.variant} minus {contrast.reference}"


def _excludes_zero(found: Spread) -> bool:
    return not math.isnan(found.low) and (found.low > 0 or found.high < 0)


def _interval(found: Spread) -> str:
    if math.isnan(found.low):
        return f"{found.mean:+.3f} "
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]{'*' if _excludes_zero(found) else ' '}"
