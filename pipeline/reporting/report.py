"""One self-contained HTML page about a run: verdict, results, training curves, samples and costs."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

from pipeline.evaluation.alarms import DIFFICULTY_ALARMS, DIRECT_ALARMS, POLICY_ALARMS, REWARD_ALARMS
from pipeline.evaluation.reasons import REASON_PREFIX, TRUSTED_PAIR_ACCURACY, named_contributions, verified_objectives
from pipeline.objectives.reward_comparison import compare_rewards
from pipeline.records import Answer
from pipeline.reporting.alarm_history import AlarmHistory, alarm_histories
from pipeline.reporting.charts import DIRECT_CHARTS, POLICY_CHARTS, REWARD_CHARTS
from pipeline.reporting.line_chart import DrawnChart, draw_charts
from pipeline.reporting.report_data import ReportData
from pipeline.reporting.results import results_table, source_rows
from pipeline.reporting.verdict import Finding, verdict
from pipeline.rollouts.kept_samples import KeptSample, SamplesOfPolicy

SAMPLES_SHOWN = 8


def findings(data: ReportData) -> list[Finding]:
    """The sentences that open the report."""
    return verdict(data.reward_metrics, data.benchmark_metrics, data.exported_step, data.objectives, alarms_of(data))


def alarms_of(data: ReportData) -> list[AlarmHistory]:
    """The alarms that the reward model and the alignment checked."""
    reward = data.reward_metrics
    are_pairs_scored = any(name.startswith(REASON_PREFIX) and name.endswith("/pairs") for name in reward)
    about_policy = (*POLICY_ALARMS, *DIFFICULTY_ALARMS, *DIRECT_ALARMS)
    return [
        *alarm_histories(data.reward_rows, reward, REWARD_ALARMS, are_pairs_scored=are_pairs_scored),
        *alarm_histories(data.alignment_rows, data.exported_step, about_policy, are_pairs_scored=are_pairs_scored),
    ]


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


@dataclass(frozen=True, kw_only=True)
class WeightBar:
    """The weight of one objective over prompts of one kind."""

    objective: str
    inferred: float
    """Mean of the reward model's weights."""
    planted: float | None
    """w*; None if the truth is unknown."""


def weight_bars(data: ReportData) -> list[tuple[str, int, list[WeightBar]]]:
    """(kind of prompt, number of prompts, bars); empty without objective weights."""
    by_kind: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for answer in data.base:
        if answer.score.objective_weights:
            by_kind[data.kinds.get(answer.prompt_id, "all prompts")].append(answer.score.objective_weights)
    return [
        (
            kind,
            len(weights),
            [
                WeightBar(
                    objective=name,
                    inferred=sum(column) / len(column),
                    planted=data.planted_weights.get(kind, {}).get(name),
                )
                for name, column in zip(data.objectives, zip(*weights, strict=True), strict=True)
            ],
        )
        for kind, weights in sorted(by_kind.items())
    ]


@dataclass(frozen=True, kw_only=True)
class SamplePair:
    """The answers of both policies to one prompt."""

    base: Answer
    aligned: Answer
    gold: tuple[float, float] | None
    """True reward of both, from 1 to 5; None if the truth is unknown."""
    reasons: list[tuple[str, float]]
    """(verified objective, what it adds to the reward of the aligned answer above that of the base answer)."""

    @property
    def margin(self) -> float:
        return self.aligned.score.mean - self.base.score.mean

    @property
    def is_fooled(self) -> bool:
        """Whether reward and true reward disagree on the better answer."""
        return self.gold is not None and self.margin * (self.gold[1] - self.gold[0]) < 0


def sample_pairs(data: ReportData) -> list[SamplePair]:
    """The largest losses of reward first, because they teach the most. Then the largest gains."""
    verified = verified_objectives(data.reward_metrics, data.objectives)
    pairs = [
        SamplePair(
            base=base,
            aligned=aligned,
            gold=None
            if data.gold is None
            else (data.gold(base.instruction, base.output), data.gold(aligned.instruction, aligned.output)),
            reasons=named_contributions(
                compare_rewards(aligned.score, base.score).contributions, data.objectives, verified
            ),
        )
        for base, aligned in zip(data.base, data.aligned, strict=True)
    ]
    pairs.sort(key=lambda pair: pair.margin)
    return [*pairs[: SAMPLES_SHOWN // 2], *pairs[-SAMPLES_SHOWN // 2 :]] if len(pairs) > SAMPLES_SHOWN else pairs


def samples_over_time(over_time: Sequence[SamplesOfPolicy]) -> list[tuple[str, list[tuple[int, KeptSample]]]]:
    """(prompt, [(updates, answer), ...]) for each prompt that every policy answered."""
    by_prompt: dict[str, list[tuple[int, KeptSample]]] = defaultdict(list)
    for kept in over_time:
        for sample in kept.samples:
            by_prompt[sample.prompt_id].append((kept.updates, sample))
    return [(answers[0][1].prompt, answers) for answers in by_prompt.values() if len(answers) == len(over_time)]


def alignment_charts(data: ReportData) -> list[DrawnChart]:
    """Those of a direct alignment, or of one that samples."""
    is_direct = any("eval/chosen_change" in row for row in data.alignment_rows)
    return draw_charts(DIRECT_CHARTS if is_direct else POLICY_CHARTS, data.alignment_rows)


def report_page(data: ReportData) -> str:
    """The page as HTML. It loads nothing from elsewhere."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.reporting", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    bars, untold = reason_bars(data)
    found = findings(data)
    return environment.get_template("report.html.j2").render(
        name=data.name,
        findings=found,
        levels=Counter(finding.level for finding in found),
        alarms=alarms_of(data),
        bars=bars,
        longest_bar=max((max(abs(bar.by_score), abs(bar.by_annotations)) for bar in bars), default=0.0) or 1.0,
        untold=untold,
        has_reward_model=data.reward_model_fingerprint is not None,
        trusted=TRUSTED_PAIR_ACCURACY,
        results=results_table(data),
        sources=source_rows(data.reward_metrics),
        reward_charts=draw_charts(REWARD_CHARTS, data.reward_rows),
        alignment_charts=alignment_charts(data),
        weights=weight_bars(data),
        over_time=samples_over_time(data.over_time),
        samples=sample_pairs(data),
        gold=data.gold,
        stages=[stage.cells for stage in data.stages],
        versions=data.stages[-1].versions if data.stages else {},
        recipe=json.dumps(data.recipe, indent=2),
    )
