"""Rollouts, their scores and the learner's evaluation of them become the experience of one PPO step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.config.schema import KLConfig, PPOConfig
from pipeline.errors import NumericsError, ShapeError
from pipeline.objectives.advantages import generalized_advantages, token_rewards, transform_reward
from pipeline.objectives.divergence import kl_estimate
from pipeline.objectives.masked import masked_mean, whiten
from pipeline.records import Experience, Metrics, RewardScore, Rollout, TokenEvaluation


@dataclass(frozen=True, kw_only=True)
class RewardScale:
    """Mean and standard deviation of the reward model on held-out responses: the units of a z-scored reward."""

    mean: float
    std: float


def build_experience(
    rollouts: Sequence[Rollout],
    scores: Sequence[RewardScore],
    evaluations: Sequence[TokenEvaluation],
    *,
    ppo: PPOConfig,
    kl: KLConfig,
    kl_coefficient: float,
    reward_scale: RewardScale,
) -> tuple[Experience, Metrics]:
    """Shapes rewards, estimates advantages over the whole batch, and measures the batch.

    R_t = -beta k_t + 1[t = last] r~,  r~ the transformed reward minus the penalty of a response cut at the limit;
    (A, returns) by GAE; A whitened over all response tokens. Nothing here depends on how the batch is sharded later.

    Source: vrm_spec section 11.

    Args:
        rollouts, scores, evaluations: B of each, in the same order.
        kl_coefficient: beta of this step.
        reward_scale: units of the reward.

    Returns:
        The experience, and metrics named `reward/*`, `kl/*`, `response/*`, `engine_gap/*`, `value/*` and `return/*`.

    Raises:
        ShapeError: the three lists, or the tokens of one rollout, do not fit each other.
        NumericsError: a score or an evaluation is not finite.
    """
    _require_usable(rollouts, scores, evaluations)
    logprobs = _pad([e.logprobs for e in evaluations])
    reference_logprobs = _pad([e.reference_logprobs for e in evaluations])
    values = _pad([e.values for e in evaluations])
    engine_logprobs = _pad([r.logprobs for r in rollouts])
    response_lengths = torch.tensor([len(r.response_ids) for r in rollouts])
    mask = torch.arange(logprobs.shape[1]) < response_lengths.unsqueeze(-1)
    cut = torch.tensor([r.finish_reason == "length" for r in rollouts], dtype=torch.float32)

    mean = torch.tensor([s.mean for s in scores])
    std = torch.tensor([s.std for s in scores])
    reward = transform_reward(
        mean,
        std,
        ppo.reward_transform,
        reward_mean=reward_scale.mean,
        reward_std=reward_scale.std,
        lcb_coefficient=ppo.lcb_coefficient,
        clip=ppo.reward_clip,
    )
    reward = reward - ppo.no_stop_penalty * cut
    token_kl = kl_estimate(logprobs, reference_logprobs, kl.estimator)
    rewards = token_rewards(reward, token_kl, mask, kl_coefficient=kl_coefficient)
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=ppo.discount, lam=ppo.gae_lambda)

    k1 = torch.where(mask, logprobs - reference_logprobs, torch.zeros_like(logprobs))
    engine_gap = torch.where(mask, (engine_logprobs - logprobs).abs(), torch.zeros_like(logprobs))
    metrics = {
        "reward/mean": float(mean.mean()),
        "reward/std_over_batch": float(mean.std(correction=0)),
        "reward/posterior_std": float(std.mean()),
        "reward/shaped": float(reward.mean()),
        "kl/per_response": float(k1.sum(-1).mean()),
        "kl/coefficient": kl_coefficient,
        "response/tokens": float(response_lengths.float().mean()),
        "response/stopped": float(1.0 - cut.mean()),
        "engine_gap/mean": float(masked_mean(engine_gap, mask)),
        "engine_gap/max": float(engine_gap.max()),
        "value/mean": float(masked_mean(values, mask)),
        "return/mean": float(masked_mean(returns, mask)),
    }
    experience = Experience(
        sequences=tuple(r.tokens for r in rollouts),
        mask=mask,
        logprobs=logprobs,
        values=values,
        advantages=whiten(advantages, mask) if ppo.whiten_advantages else advantages,
        returns=returns,
        num_response_tokens=int(mask.sum()),
    )
    return experience, metrics


def _require_usable(
    rollouts: Sequence[Rollout], scores: Sequence[RewardScore], evaluations: Sequence[TokenEvaluation]
) -> None:
    """Finds a bad row while it still has a name; later it would be a gradient that is NaN."""
    if not len(rollouts) == len(scores) == len(evaluations) > 0:
        raise ShapeError(f"{len(rollouts)} rollouts, {len(scores)} scores and {len(evaluations)} evaluations")
    for rollout, score, evaluation in zip(rollouts, scores, evaluations, strict=True):
        name = f"prompt {rollout.prompt.id!r}, sample {rollout.sample_index}"
        lengths = {
            "response tokens": len(rollout.response_ids),
            "engine logprobs": len(rollout.logprobs),
            "learner logprobs": len(evaluation.logprobs),
            "reference logprobs": len(evaluation.reference_logprobs),
            "values": len(evaluation.values),
        }
        if len(set(lengths.values())) > 1 or not rollout.response_ids:
            raise ShapeError(f"{name}: " + ", ".join(f"{n} {what}" for what, n in lengths.items()))
        numbers = {
            "reward mean and std": (score.mean, score.std),
            "learner logprobs": evaluation.logprobs,
            "reference logprobs": evaluation.reference_logprobs,
            "values": evaluation.values,
        }
        for what, row in numbers.items():
            bad = [x for x in row if not math.isfinite(x)]
            if bad:
                raise NumericsError(
                    f"{name}: {len(bad)} of {len(row)} {what} are not finite (first {bad[0]}), so nothing was trained "
                    f"on this batch. The response begins {rollout.response_text[:80]!r}."
                )


def _pad(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    """[B, T] float32, left-aligned, 0 on padding."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float32)
