"""From finished runs to a table: a row per run, means over seeds, and paired comparisons on the same held-out rows."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from pipeline.errors import ShapeError
from pipeline.evaluation.bootstrap import Statistic, bootstrap_intervals, difference
from pipeline.evaluation.pair_metrics import calibration, pair_accuracy
from pipeline.experiments.grid import Experiment, Run, varied_settings

COLUMNS: dict[str, str] = {
    "accuracy": "eval/accuracy",
    "nll": "eval/nll",
    "ece": "eval/calibration_error",
    "margin": "eval/margin",
    "kl_w": "eval/kl_w",
    "kl_z": "eval/kl_z",
    "active_units": "eval/active_units",
    "sampled_nll": "eval/sampled_nll",
    "supervision": "eval/supervision",
    "weight_correlation": "weight_correlation",
    "longer_is_better": "eval/longer_is_better",
    "train_accuracy": "train/accuracy",
}
"""Column of the table of reward models -> what the run measured. A head that knows nothing of it has an empty cell."""

POLICY_COLUMNS: dict[str, str] = {
    "gold_win_rate": "gold/win_rate",
    "gold_win_rate_low": "gold/low",
    "gold_win_rate_high": "gold/high",
    "gold_start": "gold/base",
    "gold_end": "gold/aligned",
    "gold_fall": "gold/fall",
    "reward_win_rate": "reward/win_rate",
    "gap_start": "gap/base",
    "gap_end": "gap/aligned",
    "gap_growth": "gap/growth",
    "kl": "kl/per_response",
    "posterior_std": "reward/posterior_std",
    "words_start": "words/base",
    "words_end": "words/aligned",
    "reward_model_accuracy": "reward_model/accuracy",
}
"""Column of the table of policies -> what the run measured. `gold_fall`, `kl` and `posterior_std` are of
training rollouts, the others of held-out prompts; the bounds of the win rate are Wilson's over the prompts of a run."""

OF_A_POSTERIOR = ("kl_w", "kl_z")
PRINTED = ("accuracy", "nll", "ece", "margin", "kl_w", "kl_z", "active_units", "weight_correlation", "seconds")
CELL = 21
"""Characters of a table cell: "0.000232 +- 0.00015" and room before it."""


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run of the plan and what it left behind (the JSON of a `RunResult`)."""

    run: Run
    result: Mapping[str, Any]

    def value(self, column: str) -> float | None:
        """A cell of the table."""
        if column == "seconds":
            return float(self.result["seconds"])
        if column in OF_A_POSTERIOR and self.run.recipe.reward.head != "vrm":
            return None  # the trainer counts a divergence of 0 where there is no posterior
        return self.result["metrics"].get((COLUMNS | POLICY_COLUMNS)[column])


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean over seeds with a Student t interval of 95%; one seed has no interval (NaN)."""

    values: tuple[float, ...]
    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A variant, read in one way, minus the reference on the same held-out pairs."""

    variant: str
    reading: str
    by_seed: tuple[float, ...]
    """Difference in accuracy, a tie counting one half, seed by seed."""
    accuracy: tuple[float, float, float]
    """(value, low, high) over the pairs of all seeds together; the interval draws prompts."""
    nll: tuple[float, float, float]


def results_csv(finished: Sequence[FinishedRun], columns: Sequence[str] = (*COLUMNS,)) -> str:
    """One row per run: its identity, every varied setting, every measured column."""
    settings = varied_settings([f.run for f in finished])
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["variant", "seed", "config_hash", *settings, *columns, "seconds"])
    for i, f in enumerate(finished):
        cells = [f.value(column) for column in (*columns, "seconds")]
        writer.writerow(
            [f.run.variant.name, f.run.seed, f.run.config_hash]
            + [values[i] for values in settings.values()]
            + ["" if cell is None else f"{cell:.6g}" for cell in cells]
        )
    return stream.getvalue()


def spread(values: Sequence[float]) -> Spread:
    """mean +- t_{0.975, n-1} * s / sqrt(n) over n seeds (Student 1908)."""
    n, mean = len(values), float(np.mean(values))
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return Spread(values=tuple(values), mean=mean, low=mean - half, high=mean + half)


def by_variant(finished: Sequence[FinishedRun], column: str) -> dict[str, Spread]:
    """Variant -> its seeds' values; a variant without this measurement is left out."""
    table: dict[str, list[float]] = {}
    for f in finished:
        value = f.value(column)
        if value is not None:
            table.setdefault(f.run.variant.name, []).append(value)
    return {name: spread(values) for name, values in table.items()}


def compare(finished: Sequence[FinishedRun], reference: str) -> list[Comparison]:
    """Every variant and reading against the reference's mean reward, for the seeds that both have.

    The bootstrap draws prompts, with all their pairs of all seeds: it says how the difference would move on other
    prompts. How it moves with the seed is told by `by_seed` alone.
    """
    runs = {(f.run.variant.name, f.run.seed): f.result for f in finished}
    seeds = [seed for name, seed in runs if name == reference]
    comparisons = []
    for name in dict.fromkeys(f.run.variant.name for f in finished):
        both = [seed for seed in seeds if (name, seed) in runs]
        readings = runs[name, both[0]]["margins"] if both else {}
        for reading in readings:
            if (name, reading) == (reference, "mean"):
                continue
            pairs = [(runs[name, seed], runs[reference, seed]) for seed in both]
            comparisons.append(_compared(name, reading, pairs))
    return comparisons


def _compared(name: str, reading: str, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Comparison:
    if any(one["prompts"] != other["prompts"] for one, other in pairs):
        raise ShapeError(f"{name} was measured on other held-out pairs than the run it is compared with")
    prompts = [prompt for one, _ in pairs for prompt in one["prompts"]]
    ours = [np.array(one["margins"][reading]) for one, _ in pairs]
    theirs = [np.array(other["margins"]["mean"]) for _, other in pairs]
    statistic = difference(_measured(np.concatenate(ours)), _measured(np.concatenate(theirs)))
    values = statistic(np.arange(len(prompts)))
    intervals = bootstrap_intervals(statistic, prompts, seed=0)
    return Comparison(
        variant=name,
        reading=reading,
        by_seed=tuple(_accuracy(o) - _accuracy(t) for o, t in zip(ours, theirs, strict=True)),
        accuracy=(values["accuracy"], *intervals["accuracy"]),
        nll=(values["nll"], *intervals["nll"]),
    )


def _measured(margins: np.ndarray) -> Statistic:
    return lambda rows: {"accuracy": _accuracy(margins[rows]), "nll": calibration(margins[rows])["nll"]}


def _accuracy(margins: np.ndarray) -> float:
    return pair_accuracy(margins)["accuracy_tie_half"]


def in_words(experiment: Experiment, finished: Sequence[FinishedRun], comparisons: Sequence[Comparison]) -> str:
    """The table for a terminal."""
    columns = [c for c in PRINTED if by_variant(finished, c)]
    spreads = {column: by_variant(finished, column) for column in columns}
    names = list(dict.fromkeys(f.run.variant.name for f in finished))
    seeds = sorted({f.run.seed for f in finished})
    width = max(map(len, names)) + 2
    lines = [
        f"{experiment.title}. {experiment.question}",
        f"{len(finished)} runs, seeds {', '.join(map(str, seeds))}; mean over seeds +- 95% t interval",
        "",
        " " * width + "".join(f"{_short(column):>{CELL}}" for column in columns),
    ]
    for name in names:
        cells = (cell(spreads[column].get(name), column) for column in columns)
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>{CELL}}" for cell in cells))
    baseline = spread([v for f in finished if (v := f.value("longer_is_better")) is not None])
    lines.append(f"{'longer is better':<{width}}{baseline.mean:>{CELL}.3f}")
    if comparisons:
        lines += [
            "",
            f"minus {experiment.compare_with}, on the same held-out pairs of all seeds "
            "(95%, bootstrap over prompts; * excludes 0)",
            f"{'':<{width + 6}}{'accuracy':>28}{'NLL':>28}   accuracy by seed",
        ]
        for c in comparisons:
            named = c.variant if c.reading == "mean" else f"{c.variant} {c.reading}"
            seeds_told = " ".join(f"{value:+.3f}" for value in c.by_seed)
            lines.append(f"{named:<{width + 6}}{_interval(c.accuracy):>28}{_interval(c.nll):>28}   {seeds_told}")
    return "\n".join(line.rstrip() for line in lines)


def _short(column: str) -> str:
    return {"weight_correlation": "weights corr.", "active_units": "active"}.get(column, column)


def cell(found: Spread | None, column: str) -> str:
    if found is None:
        return "-"
    if column == "seconds":
        return f"{found.mean:.0f}"
    half = found.high - found.mean
    return f"{found.mean:.3g}" + ("" if math.isnan(half) else f" +- {half:.2g}")


def _interval(estimate: tuple[float, float, float]) -> str:
    value, low, high = estimate
    star = "*" if low > 0 or high < 0 else " "
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]{star}"
