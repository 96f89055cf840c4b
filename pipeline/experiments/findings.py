"""Tables of finished runs: one row per run, means over seeds, and paired differences on the same held-out rows."""

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
from pipeline.evaluation.bootstrap import Statistic, bootstrap_intervals, difference_of_statistics
from pipeline.evaluation.pair_metrics import accuracy_metrics, calibration
from pipeline.experiments.grid import Experiment, Run, varied_settings

REWARD_COLUMNS: dict[str, str] = {
    "accuracy": "eval/accuracy",
    "nll": "eval/nll",
    "ece": "eval/ece",
    "ece_uncalibrated": "eval/ece_uncalibrated",
    "margin": "eval/margin",
    "kl_w": "eval/kl_w",
    "kl_z": "eval/kl_z",
    "active_units": "eval/active_units",
    "sampled_nll": "eval/sampled_nll",
    "supervision": "eval/supervision",
    "weight_correlation": "reasons/weight_correlation",
    "collinearity": "reasons/collinearity",
    "decisive_accuracy": "reasons/decisive_accuracy",
    "longer_is_better": "eval/longer_is_better",
    "train_accuracy": "train/accuracy",
}
"""Column of the table of reward models -> metric of the run. The cell is empty for a head without this metric."""

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
"""Column of the table of policies -> metric of the run.

`gold_fall`, `kl` and `posterior_std` are measured on training rollouts, the others on held-out prompts. The bounds of
the win rate are those of Wilson's interval over the prompts of a run."""

POSTERIOR_COLUMNS = ("kl_w", "kl_z")
PRINTED_REWARD_COLUMNS = (
    "accuracy",
    "nll",
    "ece",
    "margin",
    "kl_w",
    "kl_z",
    "active_units",
    "weight_correlation",
    "seconds",
)
CELL = 21
"""Width of a table cell in characters: "0.000232 +- 0.00015" and the space before it."""


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run of the plan, and its result (the JSON of a `RunResult`)."""

    run: Run
    result: Mapping[str, Any]

    def value(self, column: str) -> float | None:
        """The value of one column; None if the run did not measure it."""
        if column == "seconds":
            return float(self.result["seconds"])
        if column in POSTERIOR_COLUMNS and self.run.recipe.reward.head != "vrm":
            return None  # the trainer logs a divergence of 0 for heads without a posterior
        return self.result["metrics"].get((REWARD_COLUMNS | POLICY_COLUMNS)[column])


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean over seeds with its 95% Student t interval, which is NaN for a single seed."""

    values: tuple[float, ...]
    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """One reading of a variant's reward, minus the reference, on the same held-out pairs."""

    variant: str
    reading: str
    by_seed: tuple[float, ...]
    """Difference in accuracy for each seed; a tie counts one half."""
    accuracy: tuple[float, float, float]
    """(value, low, high) over the pairs of all seeds together, by a bootstrap over prompts."""
    nll: tuple[float, float, float]


def results_csv(finished: Sequence[FinishedRun], columns: Sequence[str] = (*REWARD_COLUMNS,)) -> str:
    """One row per run: variant, seed and hash, every varied setting, every measured column."""
    settings = varied_settings([f.run for f in finished])
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["variant", "seed", "config_hash", *settings, *columns, "seconds"])
    for i, f in enumerate(finished):
        measured = [f.value(column) for column in (*columns, "seconds")]
        writer.writerow(
            [f.run.variant.name, f.run.seed, f.run.config_hash]
            + [values[i] for values in settings.values()]
            + ["" if value is None else f"{value:.6g}" for value in measured]
        )
    return stream.getvalue()


def spread(values: Sequence[float]) -> Spread:
    """mean +- t_{0.975, n-1} * s / sqrt(n) over n seeds (Student 1908)."""
    n, mean = len(values), float(np.mean(values))
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return Spread(values=tuple(values), mean=mean, low=mean - half, high=mean + half)


def by_variant(finished: Sequence[FinishedRun], column: str) -> dict[str, Spread]:
    """Variant -> the values of its seeds. A variant without this measurement is left out."""
    table: dict[str, list[float]] = {}
    for f in finished:
        value = f.value(column)
        if value is not None:
            table.setdefault(f.run.variant.name, []).append(value)
    return {name: spread(values) for name, values in table.items()}


def paired_differences(finished: Sequence[FinishedRun], reference: str) -> list[PairedDifference]:
    """Every variant and reading minus the reference's mean reward, over the seeds that both have.

    The bootstrap resamples prompts, with the pairs of all seeds. It shows how much the difference varies with the
    prompts. Only `by_seed` shows how much it varies with the seed.
    """
    runs = {(f.run.variant.name, f.run.seed): f.result for f in finished}
    seeds = [seed for name, seed in runs if name == reference]
    differences = []
    for name in dict.fromkeys(f.run.variant.name for f in finished):
        both = [seed for seed in seeds if (name, seed) in runs]
        readings = runs[name, both[0]]["margins"] if both else {}
        for reading in readings:
            if (name, reading) == (reference, "mean"):
                continue
            pairs = [(runs[name, seed], runs[reference, seed]) for seed in both]
            differences.append(_paired_difference(name, reading, pairs))
    return differences


def _paired_difference(
    name: str, reading: str, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> PairedDifference:
    if any(one["prompts"] != other["prompts"] for one, other in pairs):
        raise ShapeError(f"{name} was measured on other held-out pairs than the run it is compared with")
    prompts = [prompt for one, _ in pairs for prompt in one["prompts"]]
    variant_margins = [np.array(one["margins"][reading]) for one, _ in pairs]
    reference_margins = [np.array(other["margins"]["mean"]) for _, other in pairs]
    statistic = difference_of_statistics(
        _accuracy_and_nll(np.concatenate(variant_margins)), _accuracy_and_nll(np.concatenate(reference_margins))
    )
    values = statistic(np.arange(len(prompts)))
    intervals = bootstrap_intervals(statistic, prompts, seed=0)
    return PairedDifference(
        variant=name,
        reading=reading,
        by_seed=tuple(_accuracy(a) - _accuracy(b) for a, b in zip(variant_margins, reference_margins, strict=True)),
        accuracy=(values["accuracy"], *intervals["accuracy"]),
        nll=(values["nll"], *intervals["nll"]),
    )


def _accuracy_and_nll(margins: np.ndarray) -> Statistic:
    return lambda rows: {"accuracy": _accuracy(margins[rows]), "nll": calibration(margins[rows])["nll"]}


def _accuracy(margins: np.ndarray) -> float:
    return accuracy_metrics(margins)["accuracy_tie_half"]


def findings_text(
    experiment: Experiment, finished: Sequence[FinishedRun], differences: Sequence[PairedDifference]
) -> str:
    """The table of the runs and of their paired differences, for a terminal."""
    columns = [c for c in PRINTED_REWARD_COLUMNS if by_variant(finished, c)]
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
        cells = (spread_cell(spreads[column].get(name), column) for column in columns)
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>{CELL}}" for cell in cells))
    baseline = spread([v for f in finished if (v := f.value("longer_is_better")) is not None])
    lines.append(f"{'longer is better':<{width}}{baseline.mean:>{CELL}.3f}")
    if differences:
        lines += [
            "",
            f"minus {experiment.compare_with}, on the same held-out pairs of all seeds "
            "(95%, bootstrap over prompts; * excludes 0)",
            f"{'':<{width + 6}}{'accuracy':>28}{'NLL':>28}   accuracy by seed",
        ]
        for c in differences:
            label = c.variant if c.reading == "mean" else f"{c.variant} {c.reading}"
            by_seed = " ".join(f"{value:+.3f}" for value in c.by_seed)
            lines.append(
                f"{label:<{width + 6}}{_difference_text(c.accuracy):>28}{_difference_text(c.nll):>28}   {by_seed}"
            )
    return "\n".join(line.rstrip() for line in lines)


def _short(column: str) -> str:
    return {"weight_correlation": "weights corr.", "active_units": "active"}.get(column, column)


def spread_cell(spread: Spread | None, column: str) -> str:
    """Mean and half the interval, as a table cell."""
    if spread is None:
        return "-"
    if column == "seconds":
        return f"{spread.mean:.0f}"
    half = spread.high - spread.mean
    return f"{spread.mean:.3g}" + ("" if math.isnan(half) else f" +- {half:.2g}")


def _difference_text(estimate: tuple[float, float, float]) -> str:
    value, low, high = estimate
    star = "*" if low > 0 or high < 0 else " "
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]{star}"
