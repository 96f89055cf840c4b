"""One alignment of an experiment, in this process, held against the planted truth from the first step to the last."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from pipeline.config.alignment import AlignmentConfig
from pipeline.config.benchmark import BenchmarkConfig
from pipeline.data.preferences import normalised_prompt
from pipeline.data.prompts import PromptStream, tokenise_prompts
from pipeline.data.run_data import NamedPrompt
from pipeline.evaluation.overoptimization import GoldReward, gold_proxy_gap
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.evaluation.win_rate import compare_answers
from pipeline.experiments.policy_findings import ALIGNMENT_CURVES, fall_from_peak
from pipeline.experiments.reward_run import RunResult
from pipeline.loops.alignment import align
from pipeline.loops.generation import answer_prompts
from pipeline.ports import BackgroundRolloutSource, PolicyLearner, RewardScorer
from pipeline.records import Metrics, PolicyWeights
from pipeline.stages.workspace import StageDirectory


def align_and_measure(
    rollouts: BackgroundRolloutSource,
    scorer: RewardScorer,
    learner: PolicyLearner,
    gold: GoldReward,
    *,
    train_prompts: Sequence[NamedPrompt],
    heldout_prompts: Sequence[NamedPrompt],
    tokenizer: PreTrainedTokenizerBase,
    publish: Callable[[str, int], PolicyWeights],
    start: str,
    directory: str,
    alignment: AlignmentConfig,
    benchmark: BenchmarkConfig,
    reward_scale: RewardScale,
    seed: int,
) -> RunResult:
    """Aligns with the pipeline's own loop; then start and result answer held-out prompts.

    Args:
        gold: the truth, and its units.
        publish: a checkpoint and a version -> its published weights.
        start: directory of the policy before alignment.
        directory: for the loop's metrics and the aligned policy.
        reward_scale: of the reward model on held-out responses.

    Returns:
        metrics: those of `compare_answers` on held-out prompts; `gap/base`, `gap/aligned` and their difference
            `gap/growth` on the same; `gold/fall` of the training curve; the last step's metrics.
        margins: [prompts] aligned minus start, by "gold" and by "reward".
    """
    started = time.monotonic()
    stage = StageDirectory(directory, "align_policy", "")
    prompts = tokenise_prompts(train_prompts, tokenizer, max_prompt_tokens=alignment.max_prompt_tokens)
    metrics = align(
        rollouts,
        scorer,
        learner,
        PromptStream(prompts=tuple(prompts), seed=seed),
        stage,
        alignment,
        reward_scale=reward_scale,
        gold=gold,
    )
    rows = stage.metrics_rows()
    heldout = tokenise_prompts(heldout_prompts, tokenizer, max_prompt_tokens=benchmark.max_prompt_tokens)
    heldout = heldout[: benchmark.num_prompts]
    asked = [prompt.messages for prompt in heldout]
    answers = {}
    # Version numbers go on from the last one the learner published.
    policies = {"base": start, "aligned": stage.result_uri}
    for version, (name, checkpoint) in enumerate(policies.items(), start=alignment.num_steps + 1):
        rollouts.load_weights(publish(checkpoint, version))
        answers[name] = answer_prompts(rollouts, scorer, heldout, benchmark, generator=name, seed=seed)
    metrics |= compare_answers(answers["aligned"], answers["base"], heldout, gold.annotator)
    proxies = {name: [answer.score.mean for answer in given] for name, given in answers.items()}
    golds = {name: gold.rewards(asked, [answer.output for answer in given]) for name, given in answers.items()}
    for name in policies:
        gap = gold_proxy_gap(proxies[name], golds[name], reward_scale, gold.scale)
        metrics[f"gap/{name}"] = gap["gold/gap"]
    metrics["gap/growth"] = metrics["gap/aligned"] - metrics["gap/base"]
    metrics["gold/fall"] = fall_from_peak([row["gold/mean"] for row in rows])
    return RunResult(
        metrics=metrics,
        curve=alignment_curve(rows),
        prompts=[normalised_prompt(messages) for messages in asked],
        margins={"gold": _differences(golds), "reward": _differences(proxies)},
        seconds=time.monotonic() - started,
    )


def alignment_curve(rows: Sequence[Mapping[str, float]]) -> list[Metrics]:
    """A point a step: `step`, the updates behind the policy that was measured, and those of `ALIGNMENT_CURVES`."""
    return [{"step": float(row["step"])} | {name: row[name] for name in ALIGNMENT_CURVES} for row in rows]


def _differences(of: Mapping[str, Sequence[float]]) -> list[float]:
    return [after - before for after, before in zip(of["aligned"], of["base"], strict=True)]
