"""The published numbers of a reward model: benchmark accuracies, intervals, baseline and differences."""

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
from pipeline.evaluation.source_metrics import source_metrics, source_results
from pipeline.evaluation.win_rate import wilson_interval
from pipeline.records import Metrics

if TYPE_CHECKING:  # `--help` imports this module and must not import transformers
    from pipeline.data.evaluation_examples import EvaluationExample


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95% interval. The ends are NaN where the bootstrap gives no interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class RewardBenchmark:
    """The form of a benchmark's rows, and the accuracies computed from their rewards."""

    responses: str
    """Description of the responses of a row, for an error message."""
    accepts: Callable[[EvaluationExample], bool]
    accuracies: Callable[[ScoredRows], Statistic]
    """Depends only on rewards, so the same function also evaluates the baseline "longer is better"."""
    official: frozenset[str] = frozenset()
    """Subsets of the published benchmark; empty if there are none."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One reward model on one set of rows."""

    rows: int
    prompts: int
    """The intervals resample prompts, so few prompts with many rows give wide intervals."""
    responses: int
    cut: int
    """Rows that exceed the length of the model."""
    accuracies: Mapping[str, Estimate]
    longer_is_better: Metrics
    """The same accuracies with the length in characters as the reward."""
    diagnostics: Mapping[str, Estimate]
    """`pair_diagnostics`; empty for lists of responses."""
    sources: Metrics
    """`source_metrics`; empty for lists of responses."""
    subsets: Mapping[str, Mapping[str, float]]
    """Subset -> rows, accuracy (ties are wrong) and its 95% Wilson interval, over rows with one chosen response."""


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
        # A bootstrap draw from a small file may contain none of the official subsets.
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
    # Row -> its position among the Ties rows, or -1.
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
    """Facts about the rows, collected before the first one is scored."""

    content_key: np.ndarray
    """[N] uint64, the key of every row in order."""
    prompt_keys: np.ndarray
    """Distinct keys, sorted, as uint64."""
    notes: Sequence[str]
    """Reasons why the scores cannot be compared with published ones."""


def survey(comparisons: Iterable[EvaluationExample], benchmark: str) -> Survey:
    """Reads every row once, so that a bad row is found before a model is loaded.

    Raises:
        DataError: the benchmark cannot use a row, there are no rows, none of its subsets is there, or an id pairs
            two rows of Ties with one.
    """
    content_key, prompt_key, subsets = array("Q"), array("Q"), set()
    ties: dict[tuple[str, int], str] = {}
    for row in comparisons:
        _require_fit(row, benchmark)
        if benchmark == "rewardbench2":
            _require_new_ties_id(row, ties)
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


def _require_fit(row: EvaluationExample, benchmark: str) -> None:
    if not REWARD_BENCHMARKS[benchmark].accepts(row):
        fitting = [name for name, other in REWARD_BENCHMARKS.items() if other.accepts(row)]
        hint = f"Choose --benchmark {' or '.join(fitting)}." if fitting else "No benchmark here takes such rows."
        raise DataError(
            f"{row.place}: {len(row.chosen)} chosen and {len(row.rejected)} rejected responses in subset "
            f"{row.subset!r}, but the benchmark {benchmark!r} takes {REWARD_BENCHMARKS[benchmark].responses}. {hint}"
        )


def _require_new_ties_id(row: EvaluationExample, places: dict[tuple[str, int], str]) -> None:
    """Refuses a second row of an id, which would silently take the first one's part in its pair."""
    number = ties_number(row.id) if row.subset == TIES else None
    if number is None:
        return
    if number in places:
        raise DataError(f"{row.place}: the id {row.id!r} of {TIES} is there already, in {places[number]}. Keep one.")
    places[number] = row.place


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


# ----------------------------------------------------------------------------- evaluation


def evaluate(rows: ScoredRows, benchmark: str, *, seed: int, answer_threshold: float | None) -> Evaluation:
    """All numbers of one model. Bootstrap intervals resample prompts, not rows.

    Args:
        rows: at least one, all of the form that the benchmark takes (`survey`).
        benchmark: a key of `REWARD_BENCHMARKS`.
        answer_threshold: of the model (`RewardCalibration`).
    """
    accuracies = REWARD_BENCHMARKS[benchmark].accuracies
    return Evaluation(
        rows=len(rows),
        prompts=len(np.unique(_groups(rows))),
        responses=len(rows.rewards),
        cut=int(rows.cut.sum()),
        accuracies=_estimates(accuracies(rows), rows, seed),
        longer_is_better=accuracies(rows.scored_by_length())(np.arange(len(rows))),
        diagnostics=_estimates(_diagnostics(rows, answer_threshold), rows, seed) if rows.are_pairs else {},
        sources=_source_metrics(rows, seed) if rows.are_pairs else {},
        subsets=_subset_table(rows),
    )


def metric_differences(rows: ScoredRows, others: ScoredRows, benchmark: str, *, seed: int) -> dict[str, Estimate]:
    """Every metric of `rows` minus the metric of `others`, with the interval of the paired bootstrap.

    Args:
        rows, others: the same rows in the same order (`ScoredRows.in_order_of`), scored by two models. Names and
            subsets come from `rows`.
    """
    accuracies = REWARD_BENCHMARKS[benchmark].accuracies
    others = rows.scored_as(others)
    differences = _estimates(difference_of_statistics(accuracies(rows), accuracies(others)), rows, seed)
    if rows.are_pairs:
        ours, theirs = _diagnostics(rows, None), _diagnostics(others, None)
        differences |= _estimates(difference_of_statistics(ours, theirs), rows, seed)
    return differences


def as_json(value: Any) -> Any:
    """An evaluation or estimates as plain data. NaN becomes null, because JSON has no NaN."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {name: as_json(item) for name, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def headline_metrics(evaluation: Evaluation, reasons: Metrics) -> Metrics:
    """`accuracy`, `nll`, `ece` and `reasons/...`, as far as they were measured: public names, which stay.

    `nll` and `ece_uncalibrated` are those of the bare margin, `ece` that of the calibrated log-odds.
    """
    measured = {
        "accuracy": evaluation.accuracies.get("accuracy"),
        "nll": evaluation.diagnostics.get("nll"),
        "ece": evaluation.diagnostics.get("ece"),
        "ece_uncalibrated": evaluation.diagnostics.get("ece_uncalibrated"),
    }
    return {name: estimate.value for name, estimate in measured.items() if estimate is not None} | reasons


def evaluation_table(evaluation: Evaluation, differences: Mapping[str, Estimate], reasons: Mapping[str, float]) -> str:
    """The numbers as a table for the terminal.

    Args:
        reasons: `reasons/...` of annotated pairs.
    """
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
    if reasons:
        width = max(map(len, reasons))
        lines += ["", *(f"{name:<{width}}{value:>9.3f}" for name, value in reasons.items())]
    results = source_results(evaluation.sources)
    if len(results) > 1:
        lines += ["", f"{'source':<28}{'accuracy':>9}  {'95% interval':<18}{'longer is better':>18}{'rows':>9}"]
        lines += [
            f"{source.name:<28}{_estimate(Estimate(value=source.accuracy, low=low, high=high))}"
            f"{source.longer_is_better:>18.3f}{source.pairs:>9}"
            for source in results
            for low, high in [source.accuracy_interval or (math.nan, math.nan)]
        ]
    if len(evaluation.subsets) > 1:
        lines += ["", f"{'subset':<28}{'accuracy':>9}  {'95% interval':<18}{'rows':>18}"]
        lines += [
            f"{name:<28}{_estimate(Estimate(value=s['accuracy'], low=s['low'], high=s['high']))}{s['rows']:>18.0f}"
            for name, s in evaluation.subsets.items()
        ]
    if differences:
        lines += ["", f"{'this minus the other':<28}{'value':>9}  {'95% interval':<18}{'':>18}"]
        lines += [
            f"{name:<28}{_estimate(value)}{'*' if value.low > 0 or value.high < 0 else '':>18}"
            for name, value in differences.items()
        ]
        lines += ["* the interval excludes 0"]
    return "\n".join(line.rstrip() for line in lines)


# ----------------------------------------------------------------------------- parts


def _estimates(statistic: Statistic, rows: ScoredRows, seed: int) -> dict[str, Estimate]:
    intervals = bootstrap_intervals(statistic, _groups(rows), seed=seed)
    # Resampling adds noise to every bin, and |.| makes it positive: the interval would lie above the value.
    intervals |= {name: (math.nan, math.nan) for name in intervals if name.startswith("ece")}
    values = statistic(np.arange(len(rows)))
    return {
        name: Estimate(value=value, low=intervals[name][0], high=intervals[name][1]) for name, value in values.items()
    }


def _groups(rows: ScoredRows) -> np.ndarray:
    """[N] group of rows resampled together: those of one prompt, or both rows of a number in RewardBench 2's Ties."""
    groups = rows.prompt_key.copy()
    for row, identity in rows.ties_ids.items():
        groups[row] = int(identity.partition(":")[2])
    return groups


def _diagnostics(rows: ScoredRows, answer_threshold: float | None) -> Statistic:
    chosen, rejected = rows.first, rows.first_rejected
    pairs = ScoredPairs(
        chosen=rows.rewards[chosen],
        rejected=rows.rewards[rejected],
        margin_std=rows.margin_std,
        log_odds=rows.log_odds,
        length_gap=(rows.characters[chosen] - rows.characters[rejected]).astype(np.float64),
    )
    return lambda indices: pair_diagnostics(pairs.take(indices), answer_threshold=answer_threshold)


def _source_metrics(rows: ScoredRows, seed: int) -> Metrics:
    chosen, rejected = rows.first, rows.first_rejected
    return source_metrics(
        rows.rewards[chosen] - rows.rewards[rejected],
        (rows.characters[chosen] - rows.characters[rejected]).astype(np.float64),
        _groups(rows),
        rows.sources,
        seed=seed,
    )


def _subset_means(values: np.ndarray, rows: ScoredRows) -> Callable[[np.ndarray], dict[str, float]]:
    """Mean of the values [N] in each subset that occurs among the given rows."""

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
