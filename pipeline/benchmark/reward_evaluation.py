"""From scored comparisons to the numbers one publishes: benchmark accuracies, intervals, baseline, comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.benchmark.bootstrap import Statistic, bootstrap_intervals, difference
from pipeline.benchmark.pairwise import ScoredPairs, pair_accuracy, pair_diagnostics
from pipeline.benchmark.rewardbench import (
    SUBSETS,
    SUBSETS_2,
    TIES,
    best_of_n_credit,
    rewardbench2_scores,
    section_scores,
    ties_number,
    ties_statistic,
)
from pipeline.benchmark.rm_bench import DOMAINS, rm_bench_scores, style_wins
from pipeline.benchmark.win_rate import wilson_interval
from pipeline.errors import DataError
from pipeline.records import Metrics

if TYPE_CHECKING:  # this module stands behind `--help`, and theirs behind transformers
    from pipeline.benchmark.scored_comparisons import ScoredComparison
    from pipeline.data.comparisons import Comparison

    Rows = Sequence[ScoredComparison]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and its 95% interval, which is NaN where the bootstrap has none to give."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What rows a benchmark takes, and the accuracies it computes from their rewards."""

    responses: str
    """In words, for an error message."""
    accepts: Callable[[Comparison], bool]
    accuracies: Callable[[Rows], Statistic]
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


def _pairs(rows: Rows) -> Statistic:
    margins = np.array([row.chosen[0].reward - row.rejected[0].reward for row in rows])
    decided = np.array([not row.annotators_tie for row in rows])

    def accuracies(indices: np.ndarray) -> Metrics:
        metrics = pair_accuracy(margins[indices])
        kept = indices[decided[indices]]
        if len(kept) > 0 and not decided.all():
            metrics["annotators_decided"] = pair_accuracy(margins[kept])["accuracy_tie_half"]
        return metrics

    return accuracies


def _best_of_n(rows: Rows) -> Statistic:
    credit = np.array([_credit(row) for row in rows])
    return lambda indices: {
        "accuracy": float((credit[indices] == 1.0).mean()),
        "accuracy_tie_shared": float(credit[indices].mean()),
    }


def _rewardbench(rows: Rows) -> Statistic:
    accuracies = _subset_means([float(_credit(row) == 1.0) for row in rows], [row.subset for row in rows])
    pairs = _pairs(rows)

    def scores(indices: np.ndarray) -> Metrics:
        subsets = accuracies(indices)
        # A draw from a small file may hold none of the official subsets.
        return pairs(indices) | (section_scores(subsets) if SUBSETS & subsets.keys() else {})

    return scores


def _rewardbench2(rows: Rows) -> Statistic:
    is_ties = np.array([_is_ties(row) for row in rows])
    plain, ties = [row for row in rows if not _is_ties(row)], [row for row in rows if _is_ties(row)]
    plain_scores = _subset_means([_credit(row) for row in plain], [row.subset for row in plain])
    ties_scores = ties_statistic(
        [row.id for row in ties],
        [[response.reward for response in row.chosen] for row in ties],
        [[response.reward for response in row.rejected] for row in ties],
    )
    place = np.where(is_ties, is_ties.cumsum(), (~is_ties).cumsum()) - 1

    def scores(indices: np.ndarray) -> Metrics:
        of_ties = is_ties[indices]
        subsets = plain_scores(place[indices[~of_ties]])
        return rewardbench2_scores(subsets | ties_scores(place[indices[of_ties]]) if of_ties.any() else subsets)

    return scores


def _rm_bench(rows: Rows) -> Statistic:
    chosen = np.array([[response.reward for response in row.chosen] for row in rows])
    rejected = np.array([[response.reward for response in row.rejected] for row in rows])
    wins, domains = style_wins(chosen, rejected), np.array([row.subset for row in rows])
    return lambda indices: rm_bench_scores(wins[indices], domains[indices])


BENCHMARKS: Mapping[str, Benchmark] = {
    "pairs": Benchmark(
        responses="one chosen and one rejected response",
        accepts=lambda row: len(row.chosen) == len(row.rejected) == 1,
        accuracies=_pairs,
    ),
    "best_of_n": Benchmark(
        responses="one chosen response and a list of rejected ones",
        accepts=lambda row: len(row.chosen) == 1,
        accuracies=_best_of_n,
    ),
    "rewardbench": Benchmark(
        responses="one chosen and one rejected response",
        accepts=lambda row: len(row.chosen) == len(row.rejected) == 1,
        accuracies=_rewardbench,
        official=SUBSETS,
    ),
    "rewardbench2": Benchmark(
        responses='one chosen response and a list of rejected ones, or a subset "Ties" with ids ref:<n> and tied:<n>',
        accepts=lambda row: ties_number(row.id) is not None if row.subset == TIES else len(row.chosen) == 1,
        accuracies=_rewardbench2,
        official=SUBSETS_2,
    ),
    "rm_bench": Benchmark(
        responses="three chosen and three rejected responses of rising style",
        accepts=lambda row: len(row.chosen) == len(row.rejected) == 3,
        accuracies=_rm_bench,
        official=DOMAINS,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is known of the rows before the first is scored."""

    content_keys: Sequence[str]
    prompt_keys: frozenset[str]
    notes: Sequence[str]
    """What makes the scores incomparable with published ones."""


def survey(comparisons: Iterable[Comparison], benchmark: str) -> Survey:
    """Reads every row once, so that a bad last one is found before a model is loaded.

    Raises:
        DataError: a row the benchmark cannot use, no row at all, or no subset of the benchmark.
    """
    content_keys, prompt_keys, subsets = [], set(), set()
    for row in comparisons:
        _require_fit(row, benchmark)
        content_keys.append(row.content_key)
        prompt_keys.add(row.prompt_key)
        subsets.add(row.subset)
    if not content_keys:
        raise DataError("no comparison to evaluate: the files of --pairs hold no rows")
    official = BENCHMARKS[benchmark].official
    if official and not official & subsets:
        raise DataError(
            f"the subsets of these rows are {_listed(subsets)}, but the benchmark {benchmark!r} has "
            f"{_listed(official)}. Name the right field with --subset-field, or choose another --benchmark."
        )
    notes = [f"not there, so left out: {_listed(official - subsets)}"] if official - subsets else []
    if official and subsets - official:
        notes.append(f"not of the published {benchmark}: {_listed(subsets - official)}")
    return Survey(content_keys=content_keys, prompt_keys=frozenset(prompt_keys), notes=notes)


def _require_fit(row: Comparison, benchmark: str) -> None:
    if not BENCHMARKS[benchmark].accepts(row):
        fitting = [name for name, other in BENCHMARKS.items() if other.accepts(row)]
        hint = f"Choose --benchmark {' or '.join(fitting)}." if fitting else "No benchmark here takes such rows."
        raise DataError(
            f"{row.place}: {len(row.chosen)} chosen and {len(row.rejected)} rejected responses in subset "
            f"{row.subset!r}, but the benchmark {benchmark!r} takes {BENCHMARKS[benchmark].responses}. {hint}"
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


# ----------------------------------------------------------------------------- evaluation


def evaluate(rows: Rows, benchmark: str, *, seed: int) -> Evaluation:
    """All numbers of one model; bootstrap intervals draw prompts, not rows.

    Args:
        rows: at least one, all of the form the benchmark takes (`survey`).
        benchmark: a key of `BENCHMARKS`.
    """
    accuracies = BENCHMARKS[benchmark].accuracies
    return Evaluation(
        rows=len(rows),
        prompts=len({_group(row) for row in rows}),
        responses=sum(len(row.chosen) + len(row.rejected) for row in rows),
        cut=sum(row.cut for row in rows),
        accuracies=_estimates(accuracies(rows), rows, seed),
        longer_is_better=accuracies([_length_as_reward(row) for row in rows])(np.arange(len(rows))),
        diagnostics=_estimates(_diagnostics(rows), rows, seed) if all(row.is_pair for row in rows) else {},
        subsets=_subset_table(rows),
    )


def compare(rows: Rows, others: Rows, benchmark: str, *, seed: int) -> dict[str, Estimate]:
    """Every metric of `rows` minus that of `others`, with the interval of the paired bootstrap.

    Args:
        rows, others: the same comparisons in the same order (`aligned`), scored by two models. Names and subsets are
            those of `rows`.
    """
    accuracies = BENCHMARKS[benchmark].accuracies
    others = [
        replace(row, chosen=o.chosen, rejected=o.rejected, margin_std=o.margin_std)
        for row, o in zip(rows, others, strict=True)
    ]
    differences = _estimates(difference(accuracies(rows), accuracies(others)), rows, seed)
    if all(row.is_pair for row in rows):
        differences |= _estimates(difference(_diagnostics(rows), _diagnostics(others)), rows, seed)
    return differences


def as_json(value: Any) -> Any:
    """Plain data of an evaluation or of estimates; NaN, which JSON does not have, becomes null."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {name: as_json(item) for name, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def as_table(evaluation: Evaluation, comparison: Mapping[str, Estimate]) -> str:
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


def _estimates(statistic: Statistic, rows: Rows, seed: int) -> dict[str, Estimate]:
    intervals = bootstrap_intervals(statistic, [_group(row) for row in rows], seed=seed)
    # Resampling adds noise to every bin and |.| keeps it: the interval would lie above the value.
    intervals |= {name: (math.nan, math.nan) for name in intervals if name.endswith("calibration_error")}
    values = statistic(np.arange(len(rows)))
    return {
        name: Estimate(value=value, low=intervals[name][0], high=intervals[name][1]) for name, value in values.items()
    }


def _group(row: ScoredComparison) -> Hashable:
    """What is drawn together: the rows of one prompt, and both rows of a number in RewardBench 2's Ties."""
    number = ties_number(row.id) if _is_ties(row) else None
    return row.prompt_key if number is None else (TIES, number[1])


def _diagnostics(rows: Rows) -> Statistic:
    chosen, rejected = (
        np.array([(r.reward, r.characters) for r in responses], dtype=np.float64).T
        for responses in ([row.chosen[0] for row in rows], [row.rejected[0] for row in rows])
    )
    pairs = ScoredPairs(
        chosen=chosen[0],
        rejected=rejected[0],
        margin_std=np.array([row.margin_std for row in rows]),
        length_gap=chosen[1] - rejected[1],
    )
    return lambda indices: pair_diagnostics(pairs.take(indices))


def _subset_means(values: Sequence[float], subsets: Sequence[str]) -> Callable[[np.ndarray], dict[str, float]]:
    """Mean of the values of each subset that is among the rows."""
    names, codes = np.unique(np.asarray(subsets, dtype=str), return_inverse=True)
    column = np.asarray(values, dtype=np.float64)

    def means(indices: np.ndarray) -> dict[str, float]:
        sums = np.bincount(codes[indices], column[indices], minlength=len(names))
        counts = np.bincount(codes[indices], minlength=len(names))
        return {str(names[s]): float(sums[s] / counts[s]) for s in np.flatnonzero(counts)}

    return means


def _subset_table(rows: Rows) -> dict[str, dict[str, float]]:
    table = {}
    for subset in sorted({row.subset for row in rows}):
        right = [_credit(row) == 1.0 for row in rows if row.subset == subset and len(row.chosen) == 1]
        if right:
            accuracy = sum(right) / len(right)
            low, high = wilson_interval(accuracy, len(right))
            table[subset] = {"rows": float(len(right)), "accuracy": accuracy, "low": low, "high": high}
    return table


def _credit(row: ScoredComparison) -> float:
    return best_of_n_credit(row.chosen[0].reward, [response.reward for response in row.rejected])


def _is_ties(row: ScoredComparison) -> bool:
    return row.subset == TIES and ties_number(row.id) is not None


def _length_as_reward(row: ScoredComparison) -> ScoredComparison:
    chosen, rejected = (
        tuple(replace(response, reward=float(response.characters)) for response in side)
        for side in (row.chosen, row.rejected)
    )
    return replace(row, chosen=chosen, rejected=rejected)


def _estimate(estimate: Estimate) -> str:
    interval = "" if math.isnan(estimate.low) else f"[{estimate.low:.3f}, {estimate.high:.3f}]"
    return f"{estimate.value:>9.3f}  {interval:<18}"
