"""From scored comparisons to the numbers one publishes: benchmark accuracies, intervals, baseline, comparison."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import DataError
from pipeline.evaluation.bootstrap import Statistic, bootstrap_intervals, difference_of_statistics
from pipeline.evaluation.pair_metrics import ScoredPairs, accuracy_metrics, pair_diagnostics
from pipeline.evaluation.rewardbench import (
    SUBSETS,
    SUBSETS_2,
    TIES,
    best_of_n_credit,
    rewardbench2_scores,
    section_scores,
    ties_number,
    ties_statistic,
)
from pipeline.evaluation.rm_bench import DOMAINS, rm_bench_scores, style_wins
from pipeline.evaluation.scored_rows import ScoredRows, key_number
from pipeline.evaluation.win_rate import wilson_interval
from pipeline.records import Metrics

if TYPE_CHECKING:  # this module stands behind `--help`, and theirs behind transformers
    from pipeline.data.evaluation_examples import Comparison


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and its 95% interval, which is NaN where the bootstrap has none to give."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class RewardBenchmark:
    """What rows a benchmark takes, and the accuracies it computes from their rewards."""

    responses: str
    """In words, for an error message."""
    accepts: Callable[[Comparison], bool]
    accuracies: Callable[[ScoredRows], Statistic]
    """Reads nothing but rewards, so that the same function rates the baseline "longer is better"."""
    official: frozenset[str] = frozenset()
    """Subsets of the published benchmark; empty where there is none."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One reward model on one set of rows."""

    rows: int
    prompts: int
    """What the intervals draw; far fewer prompts than rows make wide ones."""
    responses: int
    cut: int
    """Rows of which the model did not read all."""
    accuracies: Mapping[str, Estimate]
    longer_is_better: Metrics
    """The same accuracies when the length in characters is the reward."""
    diagnostics: Mapping[str, Estimate]
    """`pair_diagnostics`; empty for lists of responses."""
    subsets: Mapping[str, Mapping[str, float]]
    """Subset -> rows, accuracy (ties are wrong) and its 95% Wilson interval; rows with one chosen response only."""


# ----------------------------------------------------------------------------- benchmarks


def _pairs(rows: ScoredRows) -> Statistic:
    margins = rows.rewards[rows.first] - rows.rewards[rows.first_rejected]
    decided = ~rows.annotators_tie

    def accuracies(indices: np.ndarray) -> Metrics:
        metrics = accuracy_metrics(margins[indices])
        kept = indices[decided[indices]]
        if len(kept) > 0 and not decided.all():
            metrics["annotators_decided"] = accuracy_metrics(margins[kept])["accuracy_tie_half"]
        return metrics

    return accuracies


def _best_of_n(rows: ScoredRows) -> Statistic:
    credit = best_of_n_credit(rows.rewards, rows.num_responses)
    return lambda indices: {
        "accuracy": float((credit[indices] == 1.0).mean()),
        "accuracy_tie_shared": float(credit[indices].mean()),
    }


def _rewardbench(rows: ScoredRows) -> Statistic:
    right = best_of_n_credit(rows.rewards, rows.num_responses) == 1.0
    accuracies, pairs = _subset_means(right.astype(np.float64), rows), _pairs(rows)

    def scores(indices: np.ndarray) -> Metrics:
        subsets = accuracies(indices)
        # A draw from a small file may hold none of the official subsets.
        return pairs(indices) | (section_scores(subsets) if SUBSETS & subsets.keys() else {})

    return scores


def _rewardbench2(rows: ScoredRows) -> Statistic:
    plain_scores = _subset_means(best_of_n_credit(rows.rewards, rows.num_responses), rows)
    ties_rows = np.array(list(rows.ties_ids), dtype=np.int64)
    begin, middle = rows.first[ties_rows], rows.first_rejected[ties_rows]
    ties_scores = ties_statistic(
        list(rows.ties_ids.values()),
        [rows.rewards[a:b].tolist() for a, b in zip(begin, middle, strict=True)],
        [rows.rewards[a:b].tolist() for a, b in zip(middle, begin + rows.num_responses[ties_rows], strict=True)],
    )
    # Row -> its place among the Ties rows, or -1.
    place = np.full(len(rows), -1)
    place[ties_rows] = np.arange(len(ties_rows))

    def scores(indices: np.ndarray) -> Metrics:
        ties = place[indices]
        subsets = plain_scores(indices[ties < 0])
        return rewardbench2_scores(subsets | ties_scores(ties[ties >= 0]) if (ties >= 0).any() else subsets)

    return scores


def _rm_bench(rows: ScoredRows) -> Statistic:
    chosen, rejected = np.split(rows.rewards.reshape(len(rows), -1), 2, axis=1)
    wins, domains = style_wins(chosen, rejected), np.array(rows.subset_names)[rows.subset]
    return lambda indices: rm_bench_scores(wins[indices], domains[indices])


REWARD_BENCHMARKS: Mapping[str, RewardBenchmark] = {
    "pairs": RewardBenchmark(
        responses="one chosen and one rejected response",
        accepts=lambda row: len(row.chosen) == len(row.rejected) == 1,
        accuracies=_pairs,
    ),
    "best_of_n": RewardBenchmark(
        responses="one chosen response and a list of rejected ones",
        accepts=lambda row: len(row.chosen) == 1,
        accuracies=_best_of_n,
    ),
    "rewardbench": RewardBenchmark(
        responses="one chosen and one rejected response",
        accepts=lambda row: len(row.chosen) == len(row.rejected) == 1,
        accuracies=_rewardbench,
        official=SUBSETS,
    ),
    "rewardbench2": RewardBenchmark(
        responses='one chosen response and a list of rejected ones, or a subset "Ties" with ids ref:<n> and tied:<n>',
        accepts=lambda row: ties_number(row.id) is not None if row.subset == TIES else len(row.chosen) == 1,
        accuracies=_rewardbench2,
        official=SUBSETS_2,
    ),
    "rm_bench": RewardBenchmark(
        responses="three chosen and three rejected responses of rising style",
        accepts=lambda row: len(row.chosen) == len(row.rejected) == 3,
        accuracies=_rm_bench,
        official=DOMAINS,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is known of the rows before the first is scored."""

    content_key: np.ndarray
    """[N] uint64, of every row in order."""
    prompt_keys: np.ndarray
    """Each once, sorted, as uint64."""
    notes: Sequence[str]
    """What makes the scores incomparable with published ones."""


def survey(comparisons: Iterable[Comparison], benchmark: str) -> Survey:
    """Reads every row once, so that a bad last one is found before a model is loaded.

    Raises:
        DataError: a row the benchmark cannot use, no row at all, or no subset of the benchmark.
    """
    content_key, prompt_key, subsets = array("Q"), array("Q"), set()
    for row in comparisons:
        _require_fit(row, benchmark)
        content_key.append(key_number(row.content_key))
        prompt_key.append(key_number(row.prompt_key))
        subsets.add(row.subset)
    if not content_key:
        raise DataError("no comparison to evaluate: the files of --pairs hold no rows")
    official = REWARD_BENCHMARKS[benchmark].official
    if official and not official & subsets:
        raise DataError(
            f"the subsets of these rows are {_listed(subsets)}, but the benchmark {benchmark!r} has "
            f"{_listed(official)}. Name the right field with --subset-field, or choose another --benchmark."
        )
    notes = [f"not there, so left out: {_listed(official - subsets)}"] if official - subsets else []
    if official and subsets - official:
        notes.append(f"not of the published {benchmark}: {_listed(subsets - official)}")
    return Survey(content_key=np.asarray(content_key), prompt_keys=np.unique(np.asarray(prompt_key)), notes=notes)


def _require_fit(row: Comparison, benchmark: str) -> None:
    if not REWARD_BENCHMARKS[benchmark].accepts(row):
        fitting = [name for name, other in REWARD_BENCHMARKS.items() if other.accepts(row)]
        hint = f"Choose --benchmark {' or '.join(fitting)}." if fitting else "No benchmark here takes such rows."
        raise DataError(
            f"{row.place}: {len(row.chosen)} chosen and {len(row.rejected)} rejected responses in subset "
            f"{row.subset!r}, but the benchmark {benchmark!r} takes {REWARD_BENCHMARKS[benchmark].responses}. {hint}"
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


# ----------------------------------------------------------------------------- evaluation


def evaluate(rows: ScoredRows, benchmark: str, *, seed: int) -> Evaluation:
    """All numbers of one model; bootstrap intervals draw prompts, not rows.

    Args:
        rows: at least one, all of the form the benchmark takes (`survey`).
        benchmark: a key of `REWARD_BENCHMARKS`.
    """
    accuracies = REWARD_BENCHMARKS[benchmark].accuracies
    return Evaluation(
        rows=len(rows),
        prompts=len(np.unique(_groups(rows))),
        responses=len(rows.rewards),
        cut=int(rows.cut.sum()),
        accuracies=_estimates(accuracies(rows), rows, seed),
        longer_is_better=accuracies(rows.scored_by_length())(np.arange(len(rows))),
        diagnostics=_estimates(_diagnostics(rows), rows, seed) if rows.are_pairs else {},
        subsets=_subset_table(rows),
    )


def metric_differences(rows: ScoredRows, others: ScoredRows, benchmark: str, *, seed: int) -> dict[str, Estimate]:
    """Every metric of `rows` minus that of `others`, with the interval of the paired bootstrap.

    Args:
        rows, others: the same comparisons in the same order (`ScoredRows.in_order_of`), scored by two models. Names and
            subsets are those of `rows`.
    """
    accuracies = REWARD_BENCHMARKS[benchmark].accuracies
    others = rows.scored_as(others)
    differences = _estimates(difference_of_statistics(accuracies(rows), accuracies(others)), rows, seed)
    if rows.are_pairs:
        differences |= _estimates(difference_of_statistics(_diagnostics(rows), _diagnostics(others)), rows, seed)
    return differences


def as_json(value: Any) -> Any:
    """Plain data of an evaluation or of estimates; NaN, which JSON does not have, becomes null."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {name: as_json(item) for name, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def evaluation_table(evaluation: Evaluation, comparison: Mapping[str, Estimate]) -> str:
    """What the terminal shows."""
    lines = [
        f"{evaluation.rows:,} rows of {evaluation.prompts:,} prompts, {evaluation.responses:,} responses; "
        f"{evaluation.cut:,} rows longer than the model reads, and cut",
        "",
        f"{'':<28}{'value':>9}  {'95% interval':<18}{'longer is better':>18}",
    ]
    lines += [
        f"{name:<28}{_estimate(value)}{evaluation.longer_is_better[name]:>18.3f}"
        for name, value in evaluation.accuracies.items()
    ]
    if evaluation.diagnostics:
        lines += ["", *(f"{name:<28}{_estimate(value)}" for name, value in evaluation.diagnostics.items())]
    if len(evaluation.subsets) > 1:
        lines += ["", f"{'subset':<28}{'accuracy':>9}  {'95% interval':<18}{'rows':>18}"]
        lines += [
            f"{name:<28}{_estimate(Estimate(value=s['accuracy'], low=s['low'], high=s['high']))}{s['rows']:>18.0f}"
            for name, s in evaluation.subsets.items()
        ]
    if comparison:
        lines += ["", f"{'this minus the other':<28}{'value':>9}  {'95% interval':<18}{'':>18}"]
        lines += [
            f"{name:<28}{_estimate(value)}{'*' if value.low > 0 or value.high < 0 else '':>18}"
            for name, value in comparison.items()
        ]
        lines += ["* the interval excludes 0"]
    return "\n".join(line.rstrip() for line in lines)


# ----------------------------------------------------------------------------- parts


def _estimates(statistic: Statistic, rows: ScoredRows, seed: int) -> dict[str, Estimate]:
    intervals = bootstrap_intervals(statistic, _groups(rows), seed=seed)
    # Resampling adds noise to every bin and |.| keeps it: the interval would lie above the value.
    intervals |= {name: (math.nan, math.nan) for name in intervals if name.endswith("calibration_error")}
    values = statistic(np.arange(len(rows)))
    return {
        name: Estimate(value=value, low=intervals[name][0], high=intervals[name][1]) for name, value in values.items()
    }


def _groups(rows: ScoredRows) -> np.ndarray:
    """[N] what is drawn together: the rows of one prompt, and both rows of a number in RewardBench 2's Ties."""
    groups = rows.prompt_key.copy()
    for row, identity in rows.ties_ids.items():
        groups[row] = int(identity.partition(":")[2])
    return groups


def _diagnostics(rows: ScoredRows) -> Statistic:
    chosen, rejected = rows.first, rows.first_rejected
    pairs = ScoredPairs(
        chosen=rows.rewards[chosen],
        rejected=rows.rewards[rejected],
        margin_std=rows.margin_std,
        length_gap=(rows.characters[chosen] - rows.characters[rejected]).astype(np.float64),
    )
    return lambda indices: pair_diagnostics(pairs.take(indices))


def _subset_means(values: np.ndarray, rows: ScoredRows) -> Callable[[np.ndarray], dict[str, float]]:
    """Mean of the values [N] of each subset that is among the rows."""

    def means(indices: np.ndarray) -> dict[str, float]:
        subset = rows.subset[indices]
        sums = np.bincount(subset, values[indices], minlength=len(rows.subset_names))
        counts = np.bincount(subset, minlength=len(rows.subset_names))
        return {rows.subset_names[s]: float(sums[s] / counts[s]) for s in np.flatnonzero(counts)}

    return means


def _subset_table(rows: ScoredRows) -> dict[str, dict[str, float]]:
    one_chosen = np.flatnonzero(rows.num_chosen == 1)
    right = (best_of_n_credit(rows.rewards, rows.num_responses) == 1.0).astype(np.float64)
    counts = np.bincount(rows.subset[one_chosen], minlength=len(rows.subset_names))
    table = {}
    for subset, accuracy in _subset_means(right, rows)(one_chosen).items():
        count = int(counts[rows.subset_names.index(subset)])
        low, high = wilson_interval(accuracy, count)
        table[subset] = {"rows": float(count), "accuracy": accuracy, "low": low, "high": high}
    return table


def _estimate(estimate: Estimate) -> str:
    interval = "" if math.isnan(estimate.low) else f"[{estimate.low:.3f}, {estimate.high:.3f}]"
    return f"{estimate.value:>9.3f}  {interval:<18}"
