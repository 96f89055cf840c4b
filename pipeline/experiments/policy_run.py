"""One alignment of an experiment, in this process, held against the planted truth from the first step to the last."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

from pipeline.benchmark.scored_answers import read_scored_answers
from pipeline.config.recipe import ExperimentConfig
from pipeline.data.preferences import normalised_prompt
from pipeline.data.run_data import RunData
from pipeline.errors import ConfigError
from pipeline.evaluation.overoptimization import GoldReward, gold_proxy_gap
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.evaluation.reward_scorer import RewardModelScorer
from pipeline.experiments.policy_findings import POLICY_CURVE_METRICS, fall_from_peak
from pipeline.experiments.reward_run import RunResult
from pipeline.learning.builders import build_ppo_learner, engine_in_process, reference_in_process
from pipeline.loops.align_policy import AlignmentPorts, alignment_stage, run_alignment
from pipeline.loops.benchmark import (
    ALIGNED,
    BASE,
    BenchmarkPorts,
    answers_file,
    benchmark_prompts,
    benchmark_stage,
    run_benchmark,
)
from pipeline.records import Message, Metrics, StageResult
from pipeline.rollouts.torch_rollouts import TorchRollouts
from pipeline.stages import storage
from pipeline.stages.workspace import StageDirectory


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
    scorer = _scorer(experiment, reward_model, device)
    alignment, benchmark, metrics = _align_and_answer(experiment, data, policy, reward_model, scorer, directory, device)
    rows = alignment.metrics_rows()
    gold = GoldReward.of(data.gold, data.heldout_pairs)
    gaps, margins = _against_the_truth(benchmark.result_uri, conversations, gold, RewardScale.of(scorer.card))
    metrics |= gaps | {"gold/fall": fall_from_peak([row["gold/mean"] for row in rows])}
    metrics |= {f"reward_model/{name}": reward_model.metrics[f"eval/{name}"] for name in ("accuracy", "nll")}
    return RunResult(
        metrics=metrics,
        curve=alignment_curve(rows),
        prompts=[normalised_prompt(messages) for messages in conversations],
        margins=margins,
        seconds=time.monotonic() - started,
    )


def _align_and_answer(
    experiment: ExperimentConfig,
    data: RunData,
    policy: StageResult,
    reward_model: StageResult,
    scorer: RewardModelScorer,
    directory: str,
    device: str,
) -> tuple[StageDirectory, StageDirectory, Metrics]:
    """Runs both stages in this process. Returns the directories of alignment and benchmark, and the metrics of both."""
    dtype = experiment.policy.dtype
    spec = alignment_stage(experiment, policy.fingerprint, reward_model.fingerprint)
    alignment = StageDirectory.shared(directory, spec)
    benchmark = StageDirectory.shared(
        directory, benchmark_stage(experiment, policy.fingerprint, spec.fingerprint, reward_model.fingerprint)
    )
    with storage.reading(policy.location) as start:
        rollouts = TorchRollouts(start, dtype=dtype, gate_tolerance=experiment.alignment.gate_tolerance, device=device)
    published = storage.join(directory, "published")
    metrics = run_alignment(
        alignment,
        experiment,
        data,
        policy_uri=policy.location,
        reward_model_uri=reward_model.location,
        publish_directory=published,
        open_ports=lambda spec: nullcontext(
            AlignmentPorts(
                rollouts=rollouts,
                scorer=scorer,
                learner=build_ppo_learner(spec, engine_in_process(device), reference_in_process(dtype, device)),
            )
        ),
    )
    metrics |= run_benchmark(
        benchmark,
        experiment,
        data,
        policy_uri=policy.location,
        aligned_uri=alignment.result_uri,
        publish_directory=published,
        open_ports=lambda: BenchmarkPorts(rollouts=rollouts, scorer=scorer),
    )
    return alignment, benchmark, metrics


def _scorer(experiment: ExperimentConfig, reward_model: StageResult, device: str) -> RewardModelScorer:
    budget = experiment.alignment.max_tokens_per_micro_batch
    with storage.reading(reward_model.location) as directory:
        return RewardModelScorer.load(directory, max_tokens_per_batch=budget, device=device)


def _against_the_truth(
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
    """A point a step: `step`, the updates behind the policy that was measured, and those of `POLICY_CURVE_METRICS`."""
    return [{"step": float(row["step"])} | {name: row[name] for name in POLICY_CURVE_METRICS} for row in rows]


def _differences(values: Mapping[str, Sequence[float]]) -> list[float]:
    return [after - before for after, before in zip(values[ALIGNED], values[BASE], strict=True)]
