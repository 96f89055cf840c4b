"""What a validation measures: the answers of a policy to held-out prompts, with intervals over the prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pipeline.columns import Rollouts
from pipeline.evaluation.bootstrap import bootstrap_intervals
from pipeline.learning.rewarded_rows import require_finite
from pipeline.records import Metrics, ResponseEvaluations, RewardScore

UPDATES = "eval/updates"
"""The number of updates behind the policy that was measured."""


def validation_metrics(
    rollouts: Rollouts,
    scores: Sequence[RewardScore],
    evaluations: ResponseEvaluations,
    *,
    objectives: Sequence[str],
    gold: Sequence[float] | None,
    is_greedy: bool,
    seed: int,
) -> Metrics:
    """Means over the responses, each with the 95% bootstrap interval over prompts (`*_low`, `*_high`).

    Args:
        rollouts, scores, evaluations: N of each, in the same order.
        objectives: names of the K objective scores; not read where the reward model has none.
        gold: [N] gold rewards, None where the truth is unknown.
        is_greedy: the responses are the most likely ones, so they are no sample of the policy.
        seed: of the bootstrap.

    Returns:
        eval/reward            the reward model's mean, before any transform.
        eval/objective/<name>  the score of each objective, in units of the reward.
        eval/gold              the gold reward.
        eval/kl                sum_t (log pi - log pi_ref) a response, nats: the k1 estimate from the policy's samples.
        eval/log_ratio         the same sum over greedy responses, of which it is no estimate of the KL.
        eval/length            response tokens.
        eval/ended             share of the responses that ended before the length limit.

    Raises:
        ShapeError: not one score a rollout.
        NumericsError: a score is not finite.
    """
    require_finite(rollouts, scores)
    columns: dict[str, np.ndarray] = {
        "eval/reward": torch.tensor([score.mean for score in scores]).double().numpy(),
        "eval/log_ratio" if is_greedy else "eval/kl": evaluations.log_ratios.numpy(),
        "eval/length": rollouts.response_ids.lengths.double().numpy(),
        "eval/ended": np.array([reason != "length" for reason in rollouts.finish_reasons], dtype=float),
    }
    if scores[0].objective_scores:
        by_objective = np.array([score.objective_scores for score in scores], dtype=float)
        columns |= {f"eval/objective/{name}": by_objective[:, k] for k, name in enumerate(objectives)}
    if gold is not None:
        columns["eval/gold"] = np.array(gold, dtype=float)
    return with_intervals(columns, [prompt.id for prompt in rollouts.prompts], seed=seed)


def with_intervals(columns: dict[str, np.ndarray], prompts: Sequence[str], *, seed: int) -> Metrics:
    """The mean of each [N] column, and the ends of its interval over prompts, where there are two prompts at least."""
    names, table = list(columns), np.stack(list(columns.values()), axis=1)

    def means(rows: np.ndarray) -> Metrics:
        return dict(zip(names, table[rows].mean(0).tolist(), strict=True))

    metrics = means(np.arange(len(prompts)))
    for name, (low, high) in bootstrap_intervals(means, prompts, seed=seed).items():
        if low == low:  # NaN where one prompt says nothing about the others
            metrics |= {f"{name}_low": low, f"{name}_high": high}
    return metrics
