"""One alignment of an experiment in this process, measured against the planted truth at every step."""

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
from pipeline.experiments.policy_findings import POLICY_CURVE_METRICS, fall_from_peak
from pipeline.experiments.reward_run import RunResult
from pipeline.loops.alignment import align
from pipeline.loops.generation import answer_prompts
from pipeline.ports import BackgroundRolloutSource, PolicyLearner, RewardScorer
from pipeline.records import Answer, Metrics, PolicyWeights, Prompt
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
    """Aligns with the pipeline's own loop. Then the policies before and after answer held-out prompts.

    Args:
        gold: the true reward, with its scale.
        publish: (checkpoint, version) -> published weights.
        start: checkpoint directory of the policy before alignment.
        directory: where the loop writes its metrics and the aligned policy.
        reward_scale: that of the reward model on held-out responses.

    Returns:
        metrics: those of the last step and of `compare_answers` on held-out prompts; `gap/base`, `gap/aligned` and
            their difference `gap/growth` on the same prompts; `gold/fall` of the training curve.
        margins: [prompts] aligned minus start, by "gold" and by "reward".
    """
    started = time.monotonic()
    stage = StageDirectory(directory, "align_policy", "")
    prompts = tuple(tokenise_prompts(train_prompts, tokenizer, max_prompt_tokens=alignment.max_prompt_tokens))
    metrics = align(
        rollouts,
        scorer,
        learner,
        PromptStream(prompts=prompts, seed=seed),
        stage,
        alignment,
        reward_scale=reward_scale,
        seed=seed,
        gold=gold,
    )
    heldout = tokenise_prompts(heldout_prompts, tokenizer, max_prompt_tokens=benchmark.max_prompt_tokens)
    heldout = heldout[: benchmark.num_prompts]

    def answer(name: str, checkpoint: str, version: int) -> list[Answer]:
        rollouts.load_weights(publish(checkpoint, version))
        return answer_prompts(rollouts, scorer, heldout, benchmark, generator=name, seed=seed)

    # These versions must be higher than the last one that the learner published.
    answers = {
        "base": answer("base", start, alignment.num_steps + 1),
        "aligned": answer("aligned", stage.result_uri, alignment.num_steps + 2),
    }
    heldout_metrics, margins = _measure_answers(answers, heldout, gold, reward_scale)
    rows = stage.metrics_rows()
    return RunResult(
        metrics=metrics | heldout_metrics | {"gold/fall": fall_from_peak([row["gold/mean"] for row in rows])},
        curve=alignment_curve(rows),
        prompts=[normalised_prompt(prompt.messages) for prompt in heldout],
        margins=margins,
        seconds=time.monotonic() - started,
    )


def _measure_answers(
    answers: Mapping[str, Sequence[Answer]], prompts: Sequence[Prompt], gold: GoldReward, reward_scale: RewardScale
) -> tuple[Metrics, dict[str, list[float]]]:
    """Metrics of the answers of "base" and "aligned" to held-out prompts, and the margins between the two."""
    conversations = [prompt.messages for prompt in prompts]
    metrics = compare_answers(answers["aligned"], answers["base"], prompts, gold.annotator)
    proxies = {name: [a.score.mean for a in by_policy] for name, by_policy in answers.items()}
    golds = {name: gold.rewards(conversations, [a.output for a in by_policy]) for name, by_policy in answers.items()}
    for name in answers:
        gap = gold_proxy_gap(proxies[name], golds[name], reward_scale, gold.scale)
        metrics[f"gap/{name}"] = gap["gold/gap"]
    metrics["gap/growth"] = metrics["gap/aligned"] - metrics["gap/base"]
    return metrics, {"gold": _differences(golds), "reward": _differences(proxies)}


def alignment_curve(rows: Sequence[Mapping[str, float]]) -> list[Metrics]:
    """One point per step: `step`, the number of updates before its rollouts, and `POLICY_CURVE_METRICS`."""
    return [{"step": float(row["step"])} | {name: row[name] for name in POLICY_CURVE_METRICS} for row in rows]


def _differences(by_policy: Mapping[str, Sequence[float]]) -> list[float]:
    return [after - before for after, before in zip(by_policy["aligned"], by_policy["base"], strict=True)]
