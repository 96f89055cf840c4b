"""One alignment of an experiment, in this process, held against the planted truth from the first step to the last."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from pipeline.benchmark.scored_answers import read_scored_answers
from pipeline.config.recipe import ExperimentConfig
from pipeline.data.preferences import normalised_prompt
from pipeline.data.run_data import RunData
from pipeline.errors import ConfigError
from pipeline.evaluation.overoptimization import GoldReward, gold_proxy_gap
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.experiments.local_run import LocalRun, scorer_in_process
from pipeline.experiments.policy_findings import POLICY_CURVE_METRICS, fall_from_peak
from pipeline.experiments.reward_run import RunResult
from pipeline.loops.benchmark import ALIGNED, BASE, answers_file, benchmark_prompts
from pipeline.records import Message, Metrics, StageResult


def align_and_measure(
    experiment: ExperimentConfig,
    data: RunData,
    policy: StageResult,
    reward_model: StageResult,
    *,
    directory: str,
    device: str,
) -> RunResult:
    """Aligns and answers held-out prompts as the pipeline's stages do, then compares reward and truth.

    Args:
        policy, reward_model: what the alignment starts from, and what it is aligned against.
        directory: where the results of the two stages go.

    Returns:
        metrics: the last step's; those of `compare_answers` on held-out prompts; `gap/base`, `gap/aligned` and their
            difference `gap/growth` on the same; `gold/fall` of the training curve; `reward_model/*`.
        margins: [prompts] aligned minus base, by "gold" and by "reward".

    Raises:
        ConfigError: the data has no known truth, or as `run_alignment` and `run_benchmark`.
    """
    if data.gold is None:
        raise ConfigError(
            "data.sources names real data, of which the truth is not known: there is nothing to measure. Use the "
            "planted world (data.sources=[])."
        )
    # Prompts that do not fit are found before the alignment, not after it.
    conversations = [prompt.messages for prompt in benchmark_prompts(experiment, data, policy.location)[0]]
    started = time.monotonic()
    scorer = scorer_in_process(experiment, reward_model.location, device)
    run = LocalRun.open(experiment, data, policy, directory=directory, device=device)
    alignment, aligned = run.align(reward_model, scorer)
    benchmark = run.answer(aligned, reward_model, scorer)
    metrics, rows = aligned.metrics | benchmark.metrics, alignment.metrics_rows()
    gold = GoldReward.of(data.gold, data.heldout_pairs)
    gaps, margins = against_the_truth(benchmark.location, conversations, gold, RewardScale.of(scorer.card))
    metrics |= gaps | {"gold/fall": fall_from_peak([row["gold/mean"] for row in rows])}
    metrics |= {f"reward_model/{name}": reward_model.metrics[f"eval/{name}"] for name in ("accuracy", "nll")}
    return RunResult(
        metrics=metrics,
        curve=alignment_curve(rows),
        prompts=[normalised_prompt(messages) for messages in conversations],
        margins=margins,
        seconds=time.monotonic() - started,
    )


def against_the_truth(
    result: str, conversations: Sequence[Sequence[Message]], gold: GoldReward, reward_scale: RewardScale
) -> tuple[Metrics, dict[str, list[float]]]:
    """The gaps between reward and truth in the finished benchmark `result`, and what alignment changed in both."""
    answers = {name: read_scored_answers(answers_file(result, name)) for name in (BASE, ALIGNED)}
    rewards = {name: [answer.score.mean for answer in scored] for name, scored in answers.items()}
    truths = {
        name: gold.rewards(conversations, [answer.output for answer in scored]) for name, scored in answers.items()
    }
    gaps = {
        f"gap/{name}": gold_proxy_gap(rewards[name], truths[name], reward_scale, gold.scale)["gold/gap"]
        for name in answers
    }
    gaps["gap/growth"] = gaps[f"gap/{ALIGNED}"] - gaps[f"gap/{BASE}"]
    return gaps, {"gold": _differences(truths), "reward": _differences(rewards)}


def alignment_curve(rows: Sequence[Mapping[str, float]]) -> list[Metrics]:
    """A point a step: `step`, the updates behind the policy that was measured, and those of `POLICY_CURVE_METRICS`.

    The last step may have two rows, of which the second adds the validation of the finished policy.
    """
    by_step = {row["step"]: row for row in rows}
    return [{"step": float(step)} | {name: row[name] for name in POLICY_CURVE_METRICS} for step, row in by_step.items()]


def _differences(values: Mapping[str, Sequence[float]]) -> list[float]:
    return [after - before for after, before in zip(values[ALIGNED], values[BASE], strict=True)]
