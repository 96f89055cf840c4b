"""Rollouts, their scores and the learner's evaluation of them become the experience of one step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from pipeline.config.alignment import KLConfig, PPOConfig
from pipeline.errors import NumericsError, ShapeError
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.learning.algorithm import ADVANTAGES, ScoredTokens
from pipeline.objectives.advantages import overlong_penalty, token_rewards, transform_reward, uniform_groups
from pipeline.objectives.divergence import kl_estimate
from pipeline.objectives.masked import masked_mean, whiten
from pipeline.objectives.policy import truncated_importance_weights
from pipeline.records import CriticTargets, Experience, Metrics, RewardScore, Rollout, TokenEvaluation


def build_experience(
    rollouts: Sequence[Rollout],
    scores: Sequence[RewardScore],
    evaluations: Sequence[TokenEvaluation],
    *,
    ppo: PPOConfig,
    kl: KLConfig,
    kl_coefficient: float,
    reward_scale: RewardScale,
    max_response_tokens: int,
) -> tuple[Experience, Metrics]:
    """Shapes rewards, estimates advantages over the whole batch, and measures the batch.

    R_t = -beta k_t + 1[t = last] r~,  r~ the transformed reward minus the penalties of a response cut at the limit, or
    close to it; no KL here where it is part of the loss. A by the recipe's estimator, for PPO GAE, then whitened over
    all response tokens. Nothing here depends on how the batch is sharded later.

    Source: docs/method.md section 11.

    Args:
        rollouts, scores, evaluations: B of each, in the same order: by prompt, then by sample.
        kl_coefficient: beta of this step.
        reward_scale: units of the reward.
        max_response_tokens: the sampler's limit.

    Returns:
        The experience, and metrics of all rollouts named `reward/*`, `kl/*`, `response/*`, `engine_gap/*`, and where
        they have a meaning `value/*`, `return/*`, `group/*` and `importance/*`.

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

    reward = _shaped_rewards(mean, std, response_lengths, cut, ppo, reward_scale, max_response_tokens)
    token_kl = kl_estimate(logprobs, reference_logprobs, kl.estimator)
    in_reward = kl.place == "reward"
    rewards = token_rewards(reward, token_kl, mask, kl_coefficient=kl_coefficient if in_reward else 0.0)
    tokens = ScoredTokens(
        rewards=whiten(rewards, mask, keep_mean=True) if ppo.whiten_rewards else rewards,
        values=values,
        mask=mask,
        group_size=_group_size(rollouts) if ppo.compares_a_group else 1,
    )
    advantages = ADVANTAGES[ppo.advantages](tokens, ppo)
    returns = _masked(advantages + values, mask)
    weights = torch.ones_like(logprobs)
    if ppo.tis_cap is not None:
        weights = truncated_importance_weights(logprobs, engine_logprobs, mask, cap=ppo.tis_cap)

    metrics = {
        "reward/mean": float(mean.mean()),
        "reward/std_over_batch": float(mean.std(correction=0)),
        "reward/posterior_std": float(std.mean()),
        "reward/shaped": float(reward.mean()),
        "kl/per_response": float(_masked(logprobs - reference_logprobs, mask).sum(-1).mean()),
        "kl/coefficient": kl_coefficient,
        "response/tokens": float(response_lengths.float().mean()),
        "response/stopped": float(1.0 - cut.mean()),
    }
    metrics |= _engine_metrics(logprobs, engine_logprobs, weights, mask, tis_cap=ppo.tis_cap)
    if ppo.trains_a_critic:
        metrics["value/mean"] = float(masked_mean(values, mask))
        metrics["return/mean"] = float(masked_mean(returns, mask))
    if ppo.compares_a_group:
        groups = reward.view(-1, tokens.group_size)
        metrics["group/reward_std"] = float(groups.std(-1).mean())
        metrics["group/uniform"] = float(uniform_groups(groups).float().mean())

    kept = _rows_that_teach(reward, tokens.group_size) if ppo.drop_uniform_groups else torch.arange(len(rollouts))
    experience = Experience(
        sequences=tuple(rollouts[row].tokens for row in kept.tolist()),
        mask=mask[kept],
        logprobs=logprobs[kept],
        reference_logprobs=reference_logprobs[kept],
        advantages=whiten(advantages[kept], mask[kept]) if ppo.whiten_advantages else advantages[kept],
        importance_weights=weights[kept],
        kl_loss_coefficient=0.0 if in_reward else kl_coefficient,
        critic=CriticTargets(values=values[kept], returns=returns[kept]) if ppo.trains_a_critic else None,
        num_response_tokens=int(mask[kept].sum()),
    )
    return experience, metrics


def _masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, values, torch.zeros_like(values))


def _engine_metrics(
    logprobs: torch.Tensor,
    engine_logprobs: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    *,
    tis_cap: float | None,
) -> Metrics:
    """How far the engine's log-probabilities are from the learner's, and what the importance weights make of it."""
    gap = _masked((engine_logprobs - logprobs).abs(), mask)
    metrics = {"engine_gap/mean": float(masked_mean(gap, mask)), "engine_gap/max": float(gap.max())}
    if tis_cap is not None:
        metrics["importance/mean"] = float(masked_mean(weights, mask))
        metrics["importance/capped"] = float(masked_mean((weights >= tis_cap).float(), mask))
    return metrics


def _shaped_rewards(
    mean: torch.Tensor,
    std: torch.Tensor,
    response_lengths: torch.Tensor,
    cut: torch.Tensor,
    ppo: PPOConfig,
    reward_scale: RewardScale,
    max_response_tokens: int,
) -> torch.Tensor:
    """[B] transformed rewards, minus the penalties of responses that were cut at the limit, or end close to it."""
    reward = transform_reward(
        mean,
        std,
        ppo.reward_transform,
        reward_mean=reward_scale.mean,
        reward_std=reward_scale.std,
        posterior_std=reward_scale.posterior_std,
        lcb_coefficient=ppo.lcb_coefficient,
        clip=ppo.reward_clip,
    )
    reward = reward - ppo.missing_eos_penalty * cut
    if ppo.overlong_buffer == 0:
        return reward
    return reward + overlong_penalty(
        response_lengths,
        max_tokens=max_response_tokens,
        buffer_tokens=ppo.overlong_buffer * max_response_tokens,
    )


def _rows_that_teach(reward: torch.Tensor, group_size: int) -> torch.Tensor:
    """Rows of the prompts whose responses differ in reward; all rows when none do, whose advantages are then 0."""
    differ = ~uniform_groups(reward.view(-1, group_size))
    rows = torch.arange(len(reward)).view(-1, group_size)
    return rows[differ].flatten() if differ.any() else rows.flatten()


def _group_size(rollouts: Sequence[Rollout]) -> int:
    """G, where the rollouts are G samples of one prompt, then G of the next."""
    size = 1 + max(r.sample_index for r in rollouts)
    if [r.sample_index for r in rollouts] != [*range(size)] * (len(rollouts) // size):
        found = Counter(r.prompt.id for r in rollouts)
        few, many = found.most_common()[-1], found.most_common()[0]
        raise ShapeError(
            f"{len(rollouts)} rollouts are not whole groups of samples 0 to {size - 1}, ordered by prompt: "
            f"{many[0]!r} has {many[1]}, {few[0]!r} has {few[1]}. Group advantages need every sample of every prompt."
        )
    return size


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
            "engine logprobs": rollout.logprobs,
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
