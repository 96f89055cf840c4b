"""One self-contained HTML page about a run: results, training curves, samples and costs."""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from pipeline.data.preferences import LEFT_OUT_PREFIX
from pipeline.evaluation.reasons import (
    REASON_PREFIX,
    TRUSTED_PAIR_ACCURACY,
    named_contributions,
    verified_objectives,
)
from pipeline.evaluation.source_metrics import source_results
from pipeline.objectives.reward_comparison import compare_rewards
from pipeline.records import Answer, Metrics
from pipeline.reporting.axis_style import style_axis
from pipeline.reporting.verdict import Finding, verdict
from pipeline.rollouts.kept_rollouts import what_was_kept
from pipeline.rollouts.kept_samples import KeptSample, SamplesOfPolicy
from pipeline.tracking.progress import as_clock

MetricsRow = Mapping[str, Any]

BLUE, ORANGE, GREY = "#2563a8", "#d9772b", "#b8bec6"
SAMPLES_SHOWN = 8
TRUTH_ROWS = {
    "reasons/weight_correlation": "correlation of inferred with planted weights, held out",
    "reasons/decisive_accuracy": "named reasons that are the true ones, held out",
}
"""Metrics that exist where the truth is known -> their labels."""


@dataclass(frozen=True, kw_only=True)
class StageSummary:
    """One line of the cost table."""

    name: str
    seconds: float
    """Of all attempts."""
    is_skipped: bool
    """An earlier job had finished it."""
    node_peak_gib: float
    """Peak memory of all processes on the driver's node while the stage ran."""
    versions: Mapping[str, str]
    metrics: Metrics
    """Final metrics of the stage. `memory/*` is the peak of one rank or rollout worker of a training stage."""

    @property
    def cells(self) -> tuple[str, ...]:
        memory = [self.metrics.get(f"memory/{place}_peak_gib") for place in ("rank", "device", "rollout_worker")]
        peaks = [self.node_peak_gib, *memory]
        name = f"{self.name} (earlier job)" if self.is_skipped else self.name
        return (name, as_clock(self.seconds), *("" if peak is None else f"{peak:.1f}" for peak in peaks))


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """All data of the report."""

    name: str
    recipe: Mapping[str, Any]
    objectives: tuple[str, ...]
    stages: Sequence[StageSummary]
    reward_rows: Sequence[MetricsRow]
    """metrics.jsonl of train_reward_model."""
    alignment_rows: Sequence[MetricsRow]
    """metrics.jsonl of align_policy."""
    reward_metrics: Metrics
    """Empty without a reward model: the rewards of the alignment then scored the answers."""
    reward_model_fingerprint: str | None
    """Identity of the reward model's content, as the service and the other jobs give it; None without one."""
    benchmark_metrics: Metrics
    base: Sequence[Answer]
    aligned: Sequence[Answer]
    """Answers to the same prompts as `base`, in the same order."""
    kinds: Mapping[str, str]
    """Prompt id -> kind; empty if the kinds are unknown."""
    over_time: Sequence[SamplesOfPolicy]
    """Answers to the same held-out prompts during alignment, in its order; empty where none were kept."""
    planted_weights: Mapping[str, Mapping[str, float]]
    """Kind -> objective -> w*; empty if the truth is unknown."""


def findings(data: ReportData) -> list[Finding]:
    """The sentences that open the report."""
    return verdict(data.reward_metrics, data.benchmark_metrics, _exported_step(data), data.objectives)


def _exported_step(data: ReportData) -> MetricsRow:
    """The metrics of the step whose policy the alignment exported. After a KL stop that is not the last one."""
    last = data.alignment_rows[-1] if data.alignment_rows else {}
    exported = next((stage.metrics for stage in data.stages if stage.name == "align_policy"), {})
    return {**last, **exported}


@dataclass(frozen=True, kw_only=True)
class ReasonBar:
    """What one verified objective adds to the mean margin of held-out pairs, in units of the reward."""

    objective: str
    pair_accuracy: float
    by_score: float
    """Mean over annotated pairs of weight times score, chosen minus rejected."""
    by_annotations: float
    """The same with the annotators' score in the place of the model's."""


def reason_bars(data: ReportData) -> tuple[list[ReasonBar], list[str]]:
    """Bars of the verified objectives, and the names of the objectives of which the model cannot tell."""
    metrics = data.reward_metrics
    verified = [
        name
        for name in verified_objectives(metrics, data.objectives)
        if f"{REASON_PREFIX}{name}/contribution" in metrics
    ]
    bars = [
        ReasonBar(
            objective=name,
            pair_accuracy=metrics[f"{REASON_PREFIX}{name}/pair_accuracy"],
            by_score=metrics[f"{REASON_PREFIX}{name}/contribution"],
            by_annotations=metrics[f"{REASON_PREFIX}{name}/contribution_by_annotations"],
        )
        for name in verified
    ]
    return bars, [name for name in data.objectives if name not in verified]


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
    last = _exported_step(data)
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


def report_page(data: ReportData) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((Path(__file__).parent / "report.html.j2").read_text())
    samples = sorted(
        zip(data.base, data.aligned, strict=True), key=lambda pair: pair[1].score.mean - pair[0].score.mean
    )
    # The largest losses first, because they teach the most. Then the largest gains.
    shown = samples[: SAMPLES_SHOWN // 2] + samples[-SAMPLES_SHOWN // 2 :] if len(samples) > SAMPLES_SHOWN else samples
    bars, untold = reason_bars(data)
    return template.render(
        name=data.name,
        findings=findings(data),
        bars=bars,
        longest_bar=max((max(abs(bar.by_score), abs(bar.by_annotations)) for bar in bars), default=0.0) or 1.0,
        untold=untold,
        trusted=TRUSTED_PAIR_ACCURACY,
        results=results_table(data),
        sources=source_rows(data.reward_metrics),
        reward_figure=_reward_figure(data.reward_rows),
        alignment_figure=_alignment_figure(data.alignment_rows),
        weights_figure=_weights_figure(data),
        over_time=samples_over_time(data.over_time),
        samples=[(base, aligned, _reasons(data, base, aligned)) for base, aligned in shown],
        stages=[stage.cells for stage in data.stages],
        versions=data.stages[-1].versions if data.stages else {},
        recipe=json.dumps(data.recipe, indent=2),
    )


def samples_over_time(over_time: Sequence[SamplesOfPolicy]) -> list[tuple[str, list[tuple[int, KeptSample]]]]:
    """(prompt, [(updates, answer), ...]) for each prompt that every policy answered."""
    by_prompt: dict[str, list[tuple[int, KeptSample]]] = defaultdict(list)
    for kept in over_time:
        for sample in kept.samples:
            by_prompt[sample.prompt_id].append((kept.updates, sample))
    return [(answers[0][1].prompt, answers) for answers in by_prompt.values() if len(answers) == len(over_time)]


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


# ----------------------------------------------------------------------------- figures


def _reward_figure(rows: Sequence[MetricsRow]) -> str:
    panels = {
        "accuracy": ("train/accuracy", "eval/accuracy"),
        "NLL": ("train/nll", "eval/nll"),
        "mean |margin|": ("train/margin", "eval/margin"),
        "KL_w": ("train/kl_w", "eval/kl_w"),
        "KL_z per pair": ("train/kl_z", "eval/kl_z"),
        "active units": ("", "eval/active_units"),
    }
    return _grid(rows, panels, ("training", "held out"))


def _alignment_figure(rows: Sequence[MetricsRow]) -> str:
    if any("eval/chosen_change" in row for row in rows):
        return _direct_figure(rows)
    panels = {
        "reward": ("reward/mean", "eval/reward"),
        "KL per response, nats": ("kl/per_response", "eval/kl"),
        "response tokens": ("response/tokens", "eval/length"),
        "entropy, nats": ("ppo/entropy", ""),
        "value loss": ("ppo/value_loss", ""),
        "clip fraction": ("ppo/clip_fraction", ""),
        "engine-learner gap": ("engine_gap/mean", "gate/max"),
        "tokens per second": ("tokens_per_s/rollout", "tokens_per_s/step"),
    }
    if any("gold/mean" in row for row in rows):
        panels |= {
            "gold reward, by the planted truth": ("gold/mean", "eval/gold"),
            "gold-proxy gap, standard deviations": ("gold/gap", ""),
        }
    second = "held out; gate; whole step" if any("eval/reward" in row for row in rows) else "gate, or whole step"
    return _grid(rows, panels, ("sampling", second))


def _direct_figure(rows: Sequence[MetricsRow]) -> str:
    panels = {
        "loss": ("train/loss", "eval/loss"),
        "accuracy of the implicit reward": ("train/accuracy", "eval/accuracy"),
        "its margin": ("train/margin", "eval/margin"),
        "chosen: change of log-probability, nats": ("train/chosen_change", "eval/chosen_change"),
        "rejected: change of log-probability, nats": ("train/rejected_change", "eval/rejected_change"),
        "gradient norm": ("grad_norm", ""),
    }
    return _grid(rows, panels, ("training", "held out"))


def _grid(rows: Sequence[MetricsRow], panels: Mapping[str, tuple[str, str]], labels: tuple[str, str]) -> str:
    columns = len(panels) // 2
    figure, axes = plt.subplots(2, columns, figsize=(3.4 * columns, 5.0), squeeze=False)
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=True):
        for name, label, colour in zip(names, labels, (BLUE, ORANGE), strict=True):
            points = [(row["step"] + 1, row[name]) for row in rows if name in row]
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    label=label,
                    marker="o" if len(points) < 12 else None,
                    ms=3,
                )
        style_axis(axis, title)
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if len(handles) > 1:
        figure.legend(handles.values(), handles.keys(), loc="lower center", ncol=2, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return _png(figure)


def _weights_figure(data: ReportData) -> str | None:
    """Bars of inferred and planted weights by kind of prompt; None without objective weights."""
    if not data.base or not data.base[0].score.objective_weights:
        return None
    by_kind: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for answer in data.base:
        by_kind[data.kinds.get(answer.prompt_id, "all prompts")].append(answer.score.objective_weights)
    figure, axes = plt.subplots(1, len(by_kind), figsize=(3.4 * max(2, len(by_kind)), 2.8), sharey=True, squeeze=False)
    for axis, (kind, weights) in zip(axes.flat, sorted(by_kind.items()), strict=True):
        places = range(len(data.objectives))
        means = [sum(w[k] for w in weights) / len(weights) for k in places]
        axis.bar([p - 0.2 for p in places], means, 0.4, color=BLUE, label="inferred")
        if kind in data.planted_weights:
            truth = [data.planted_weights[kind][name] for name in data.objectives]
            axis.bar([p + 0.2 for p in places], truth, 0.4, color=GREY, label="planted")
        axis.set_xticks(list(places), data.objectives, rotation=30, ha="right", fontsize=8)
        style_axis(axis, kind)
    axes.flat[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return _png(figure)


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


# ----------------------------------------------------------------------------- numbers


def _reasons(data: ReportData, base: Answer, aligned: Answer) -> list[tuple[str, float]]:
    """What each verified objective adds to the reward of the aligned answer above that of the base answer."""
    verified = verified_objectives(data.reward_metrics, data.objectives)
    return named_contributions(compare_rewards(aligned.score, base.score).contributions, data.objectives, verified)


def _fidelity_rows(data: ReportData) -> list[tuple[str, str]]:
    """How often each objective's score orders held-out pairs as its annotator does, and whether that is enough."""
    verified = verified_objectives(data.reward_metrics, data.objectives)
    return [
        (
            f"held-out pairs that the score of {name} orders as its annotator",
            f"{data.reward_metrics[key]:.3f}" + ("" if name in verified else ", too few to be a reason"),
        )
        for name in data.objectives
        if (key := f"reasons/{name}/pair_accuracy") in data.reward_metrics
    ]


def _win_rate_text(metrics: Metrics, prefix: str) -> str:
    rate, low, high = (metrics[f"{prefix}/{name}"] for name in ("win_rate", "low", "high"))
    return f"{rate:.3f}  [{low:.3f}, {high:.3f}]"
