"""The tables of a report: its main numbers, and those of each source of pairs."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.data.preferences import LEFT_OUT_PREFIX
from pipeline.evaluation.reasons import REASON_PREFIX, verified_objectives
from pipeline.evaluation.source_metrics import source_results
from pipeline.records import Metrics
from pipeline.reporting.report_data import MetricsRow, ReportData, StageSummary
from pipeline.rollouts.kept_rollouts import what_was_kept
from pipeline.tracking.progress import as_clock

TRUTH_ROWS = {
    "reasons/weight_correlation": "correlation of inferred with planted weights, held out",
    "reasons/decisive_accuracy": "named reasons that are the true ones, held out",
}
"""Metrics that exist where the truth is known -> their labels."""


def _time_text(stages: Sequence[StageSummary]) -> str:
    """The time of what this run computed; names what it did not."""
    skipped = ", ".join(stage.name for stage in stages if stage.is_skipped)
    total = as_clock(sum(stage.seconds for stage in stages if not stage.is_skipped))
    return f"{total}, without what an earlier job finished: {skipped}" if skipped else total


def results_table(data: ReportData) -> list[tuple[str, str]]:
    """(label, value) rows of the main numbers, for the page and for the terminal."""
    benchmark = data.benchmark_metrics
    scorer = "the alignment's rewards" if data.reward_model_fingerprint is None else "the reward model"
    rows = _reward_model_rows(data)
    rows += [
        (f"win rate over base, by {scorer}", _win_rate_text(benchmark, "reward")),
        ("mean reward, base to aligned", f"{benchmark['reward/base']:.3f} to {benchmark['reward/aligned']:.3f}"),
        ("mean length in words, base to aligned", f"{benchmark['words/base']:.1f} to {benchmark['words/aligned']:.1f}"),
    ]
    if "judge/win_rate" in benchmark:
        rows.append(("win rate over base, by the judge, trained on other prompts", _win_rate_text(benchmark, "judge")))
        rows += [
            (f"  on the prompts of {source}", _win_rate_text(benchmark, f"judge/{source}"))
            for source in sorted({name.split("/")[1] for name in benchmark if name.endswith("/prompts")})
        ]
    if "gold/win_rate" in benchmark:
        rows += [
            ("win rate over base, by the gold annotator", _win_rate_text(benchmark, "gold")),
            ("mean gold reward, base to aligned", f"{benchmark['gold/base']:.3f} to {benchmark['gold/aligned']:.3f}"),
        ]
    rows += _alignment_rows(data)
    rows += [
        ("time", _time_text(data.stages)),
        ("peak memory of the driver's node, GiB", f"{max(stage.node_peak_gib for stage in data.stages):.1f}"),
    ]
    return rows


def _reward_model_rows(data: ReportData) -> list[tuple[str, str]]:
    """Empty without a reward model."""
    if data.reward_model_fingerprint is None:
        return []
    reward = data.reward_metrics
    rows = [
        ("reward model: fingerprint", data.reward_model_fingerprint[:12]),
        ("reward model: held-out accuracy", f"{reward['eval/accuracy']:.3f}"),
        ("longer is better, same pairs", f"{reward['eval/longer_is_better']:.3f}"),
        ("reward model: held-out NLL (ln 2 = 0.693 says nothing)", f"{reward['eval/nll']:.3f}"),
        ("reward model: mean |margin|", f"{reward['eval/margin']:.3f}"),
    ]
    if "eval/mismatched_accuracy" in reward:
        interval = f"[{reward['eval/mismatched_accuracy_low']:.3f}, {reward['eval/mismatched_accuracy_high']:.3f}]"
        label = "chosen responses that beat one chosen for another prompt"
        rows.append((label, f"{reward['eval/mismatched_accuracy']:.3f}  {interval}"))
    if {"eval/ece", "eval/ece_uncalibrated"} <= reward.keys():
        errors = f"{reward['eval/ece_uncalibrated']:.3f}, {reward['eval/ece']:.3f}"
        rows.append(("reward model: calibration error, before and after calibration", errors))
    if "eval/active_units" in reward:
        rows.append(("reward model: active semantic units", f"{reward['eval/active_units']:.0f}"))
    rows += _fidelity_rows(data)
    return rows + [(label, f"{reward[key]:.3f}") for key, label in TRUTH_ROWS.items() if key in reward]


def _source_rows_of_alignment(rows: Sequence[MetricsRow]) -> list[tuple[str, str]]:
    """The mean of each reward, where the alignment had several or none of a model, and what failed."""
    first, last = rows[0], rows[-1]
    names = sorted(key.removesuffix("/failed").removeprefix("reward/") for key in last if key.endswith("/failed"))
    if names == ["model"]:
        return []
    table = [
        (f"reward {name}, first to last step", f"{first[key]:.3f} to {last[key]:.3f}")
        for name in names
        if (key := f"reward/{name}") in first and key in last
    ]
    failures = {name: sum(row.get(f"reward/{name}/failed", 0.0) for row in rows) for name in names}
    return table + [
        (f"responses without a score by {name}", f"{count:.0f}") for name, count in failures.items() if count
    ]


def _alignment_rows(data: ReportData) -> list[tuple[str, str]]:
    if not data.alignment_rows:
        return []
    last = data.exported_step
    if "eval/chosen_change" in last:  # aligned directly: the last row is the evaluation of the finished policy
        return [
            ("implicit reward: held-out accuracy", f"{last['eval/accuracy']:.3f}"),
            ("implicit reward: held-out margin", f"{last['eval/margin']:.3f}"),
            (
                "change of log-probability, chosen and rejected, nats per response",
                f"{last['eval/chosen_change']:+.2f} and {last['eval/rejected_change']:+.2f}",
            ),
        ]
    rows = [
        *_source_rows_of_alignment(data.alignment_rows),
        ("KL to the reference, nats per response", f"{last['kl/per_response']:.2f}"),
    ]
    if kept := what_was_kept(data.alignment_rows):
        rows.append(("rollouts kept for `vrm rollouts`", kept))
    if "eval/reward" in last:
        ends = tuple(last[key] for key in ("eval/reward_low", "eval/reward_high") if key in last)
        reward = _with_interval(last["eval/reward"], ends)
        rows.append((f"reward of held-out prompts after {last['eval/updates']:.0f} updates", reward))
    # A step that the KL limit stopped has no update, so nothing passed the gate behind it.
    gate = [row["gate/max"] for row in data.alignment_rows if "gate/max" in row]
    if gate:
        rows.append(("largest engine-learner logprob gap at the gate", f"{max(gate):.1e}"))
    if "kl/stopped_at_step" in last:
        stop = f"step {last['kl/stopped_at_step']:.0f}, at {last['kl/at_stop']:.2f} nats per response"
        rows.append(("stopped by alignment.kl.stop_above; the commit before is kept", stop))
    gaps = [row["gold/gap"] for row in data.alignment_rows if "gold/gap" in row]
    if gaps:
        rows.append(("gold-proxy gap in sd, first to last step", f"{gaps[0]:+.2f} to {gaps[-1]:+.2f}"))
    return rows


def source_rows(metrics: Metrics) -> list[tuple[str, ...]]:
    """The table of the sources of the pairs; empty where none is known."""
    return [
        (
            source.name,
            f"{metrics.get(f'data/source/{source.name}/train_pairs', 0.0):.0f}",
            f"{source.pairs}",
            _with_interval(source.accuracy, source.accuracy_interval),
            _with_interval(source.nll, source.nll_interval),
            f"{source.longer_is_better:.3f}",
            _left_out_words(metrics, source.name),
        )
        for source in source_results(metrics)
    ]


def _with_interval(value: float, interval: tuple[float, ...]) -> str:
    return " ".join([f"{value:.3f}", *([f"[{interval[0]:.3f}, {interval[1]:.3f}]"] if interval else [])])


def _left_out_words(metrics: Metrics, source: str) -> str:
    prefix = f"{LEFT_OUT_PREFIX}{source}/"
    reasons = {
        key.removeprefix(prefix).replace("_", " "): count for key, count in metrics.items() if key.startswith(prefix)
    }
    return ", ".join(f"{count:.0f} with {reason}" for reason, count in reasons.items())


def _fidelity_rows(data: ReportData) -> list[tuple[str, str]]:
    """How often each objective's score orders held-out pairs as its annotator does, and whether that is enough."""
    verified = verified_objectives(data.reward_metrics, data.objectives)
    return [
        (
            f"held-out pairs that the score of {name} orders as its annotator",
            f"{data.reward_metrics[key]:.3f} of {data.reward_metrics[f'{REASON_PREFIX}{name}/pairs']:.0f}"
            + ("" if name in verified else ", too few to be a reason"),
        )
        for name in data.objectives
        if (key := f"{REASON_PREFIX}{name}/pair_accuracy") in data.reward_metrics
    ]


def _win_rate_text(metrics: Metrics, prefix: str) -> str:
    rate, low, high = (metrics[f"{prefix}/{name}"] for name in ("win_rate", "low", "high"))
    return f"{rate:.3f}  [{low:.3f}, {high:.3f}]"
