"""Rollouts, their scores and the learner's evaluation of them become the experience of one step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.columns import Rollouts, TokenEvaluations
from pipeline.config.alignment import AlignmentConfig, PPOConfig
from pipeline.errors import NumericsError, ShapeError
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.learning.algorithm import ADVANTAGES, ScoredTokens
from pipeline.learning.rollout_tensors import RolloutTensors, samples_per_prompt
from pipeline.objectives.advantages import (
    groups_by_size,
    overlong_penalty,
    token_rewards,
    transform_reward,
    uniform_groups,
)
from pipeline.objectives.divergence import kl_estimate
from pipeline.objectives.masked import whiten
from pipeline.objectives.policy import truncated_importance_weights
from pipeline.ragged import BLOCK_VALUES, Ragged
from pipeline.records import CriticTargets, Experience, Metrics, RewardScore


def build_experience(
    rollouts: Rollouts,
    scores: Sequence[RewardScore | None],
    evaluations: TokenEvaluations,
    config: AlignmentConfig,
    *,
    kl_coefficient: float,
    reward_scale: RewardScale,
) -> tuple[Experience, Metrics]:
    """Shapes the rewards, estimates the advantages over the whole batch, and measures the batch.

    Nothing here depends on how the batch is sharded later. Source: docs/method.md section 11.

    Args:
        rollouts, scores, evaluations: B of each, in the same order: by prompt, then by sample. A rollout whose score is
            None is left out before anything is computed, and so is one that has no other response to compare with.
        config: its sections `ppo` and `kl`, and the sampler's limit.
        kl_coefficient: beta of this step.
        reward_scale: units of the reward.

    Returns:
        The experience, and the metrics of all rollouts with a score that `batch_metrics` names.

    Raises:
        ShapeError: the three, or the tokens of one rollout, do not fit each other.
        NumericsError: a score or an evaluation is not finite; or every rollout was left out.
    """
    ppo, kl = config.ppo, config.kl
    scored = rows_with_a_score(rollouts, scores, compares_a_group=ppo.compares_a_group)
    rows = torch.tensor(scored.rows, dtype=torch.int64)
    rollouts, evaluations = rollouts.select(rows), evaluations.select(rows)
    batch, groups = RolloutTensors.of(rollouts, scored.scores, evaluations), scored.groups
    rewards = shaped_rewards(batch, ppo, reward_scale, max_response_tokens=config.max_response_tokens)
    reward_beta, loss_beta = (kl_coefficient, 0.0) if kl.place == "reward" else (0.0, kl_coefficient)
    # Without a name, so that neither tensor of tokens outlives the call that takes it.
    advantages = estimated_advantages(
        token_rewards(
            rewards,
            kl_estimate(batch.logprobs, batch.reference_logprobs, kl.estimator),
            batch.offsets,
            kl_coefficient=reward_beta,
        ),
        batch,
        ppo,
        groups=groups,
    )
    returns = advantages + batch.values if ppo.trains_a_critic else None
    weights = None if ppo.tis_cap is None else importance_weights(batch, tis_cap=ppo.tis_cap)
    kept = rows_that_teach(rewards, groups) if ppo.drop_uniform_groups else torch.arange(len(rollouts))

    def of_kept(column: torch.Tensor) -> torch.Tensor:
        """A view, where all rows stay."""
        return Ragged(column, batch.offsets).select(kept).values

    sequences, taught = rollouts.sequences.select(kept), of_kept(advantages)
    experience = Experience(
        sequences=sequences,
        rows=tuple(scored.rows[row] for row in kept.tolist()),
        offsets=sequences.response_ids.offsets,
        logprobs=of_kept(batch.logprobs),
        reference_logprobs=of_kept(batch.reference_logprobs),
        advantages=whiten(taught) if ppo.whiten_advantages else taught,
        importance_weights=None if weights is None else of_kept(weights),
        kl_loss_coefficient=loss_beta,
        critic=None if returns is None else CriticTargets(values=of_kept(batch.values), returns=of_kept(returns)),
        num_response_tokens=len(taught),
    )
    return experience, _measured(
        batch, rewards, scored, ppo, kl_coefficient=kl_coefficient, returns=returns, weights=weights
    )


def _measured(
    batch: RolloutTensors,
    rewards: torch.Tensor,
    scored: ScoredRows,
    ppo: PPOConfig,
    *,
    kl_coefficient: float,
    returns: torch.Tensor | None,
    weights: torch.Tensor | None,
) -> Metrics:
    """What `build_experience` measures of all rollouts with a score."""
    metrics = batch_metrics(batch, rewards, kl_coefficient=kl_coefficient) | engine_metrics(batch)
    if weights is not None and ppo.tis_cap is not None:
        metrics |= importance_metrics(weights, cap=ppo.tis_cap)
    if returns is not None:
        metrics |= critic_metrics(batch, returns)
    if ppo.compares_a_group:
        metrics |= group_metrics(rewards, scored.groups) | {"group/alone": float(scored.num_alone)}
    return metrics


# ------------------------------------------------------------------ rewards and advantages


@dataclass(frozen=True, kw_only=True)
class ScoredRows:
    """The rollouts of a step that have a reward, and somebody to be compared with where the estimator compares."""

    rows: list[int]
    scores: list[RewardScore]
    groups: torch.Tensor
    """[rows] int64: number of the prompt, as the step asked for it."""
    num_alone: int
    """Rollouts left out because every other response to their prompt was."""


def rows_with_a_score(
    rollouts: Rollouts, scores: Sequence[RewardScore | None], *, compares_a_group: bool
) -> ScoredRows:
    """Which rollouts the step learns from.

    Raises:
        ShapeError: not one score a rollout, or a prompt lacks samples.
        NumericsError: none is left.
    """
    if len(scores) != len(rollouts):
        raise ShapeError(f"{len(rollouts)} rollouts and {len(scores)} scores")
    size = samples_per_prompt(rollouts) if compares_a_group else 1
    with_score = [row for row, score in enumerate(scores) if score is not None]
    members = Counter(row // size for row in with_score)
    rows = [row for row in with_score if not compares_a_group or members[row // size] > 1]
    if not rows and rollouts:
        raise NumericsError(
            f"of {len(rollouts)} rollouts {len(with_score)} have a reward, and none of them another response to its "
            "prompt to be compared with. Mend the reward that fails, or give it a fixed score (alignment.rewards: "
            "on_failure)."
        )
    return ScoredRows(
        rows=rows,
        scores=[score for row in rows if (score := scores[row]) is not None],
        groups=torch.tensor([row // size for row in rows]),
        num_alone=len(with_score) - len(rows),
    )


def shaped_rewards(
    batch: RolloutTensors, ppo: PPOConfig, reward_scale: RewardScale, *, max_response_tokens: int
) -> torch.Tensor:
    """r~ = transform(r) - p_eos 1[cut] + R_length(|y|), [B]; the last term only where the recipe has a buffer.

    p_eos is the penalty of a response that was cut at the sampler's limit, R_length that of one that ends close to it.

    Source: `transform_reward` and `overlong_penalty`; p_eos as TRL's `missing_eos_penalty`.
    """
    rewards = transform_reward(
        batch.reward_mean,
        batch.reward_std,
        ppo.reward_transform,
        reward_mean=reward_scale.mean,
        reward_std=reward_scale.std,
        posterior_std=reward_scale.posterior_std,
        lcb_coefficient=ppo.lcb_coefficient,
        clip=ppo.reward_clip,
    )
    rewards = rewards - ppo.missing_eos_penalty * batch.was_cut
    if ppo.overlong_buffer == 0:
        return rewards
    buffer_tokens = ppo.overlong_buffer * max_response_tokens
    return rewards + overlong_penalty(
        batch.response_lengths, max_tokens=max_response_tokens, buffer_tokens=buffer_tokens
    )


def estimated_advantages(
    per_token_rewards: torch.Tensor, batch: RolloutTensors, ppo: PPOConfig, *, groups: torch.Tensor
) -> torch.Tensor:
    """A_t by the recipe's estimator (`ADVANTAGES`) from R_t = -beta k_t + 1[t = last] r~, [N]; not whitened.

    Args:
        per_token_rewards: [N] R_t; scaled to unit variance first where the recipe whitens rewards.
        groups: [B] number of the prompt of each row.
    """
    rewards = whiten(per_token_rewards, keep_mean=True) if ppo.whiten_rewards else per_token_rewards
    tokens = ScoredTokens(
        rewards=Ragged(rewards, batch.offsets), values=Ragged(batch.values, batch.offsets), groups=groups
    )
    return ADVANTAGES[ppo.advantages](tokens, ppo)


def importance_weights(batch: RolloutTensors, *, tis_cap: float) -> torch.Tensor:
    """[N] `truncated_importance_weights` of the learner over the engine."""
    is_token = torch.ones_like(batch.logprobs, dtype=torch.bool)
    return truncated_importance_weights(batch.logprobs, batch.engine_logprobs, is_token, cap=tis_cap)


def rows_that_teach(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Rows of the prompts whose responses differ in reward; all rows when none do, whose advantages are then 0.

    Args:
        rewards, groups: [B] the reward of each row, and the number of its prompt.
    """
    taught = [rows[~uniform_groups(rewards[rows])].flatten() for rows in groups_by_size(groups)]
    rows = torch.cat(taught).sort().values
    return rows if len(rows) else torch.arange(len(rewards))


# ------------------------------------------------------------------ metrics


def batch_metrics(batch: RolloutTensors, rewards: torch.Tensor, *, kl_coefficient: float) -> Metrics:
    """`reward/*`, `kl/*` and `response/*` of all rollouts; `rewards` [B] are the shaped ones.

    kl/per_response = mean_b sum_t (log pi - log pi_ref), the k1 estimate, whatever estimator is trained on.
    """
    kl = _sum(batch.logprobs) - _sum(batch.reference_logprobs)
    return {
        "reward/mean": float(batch.reward_mean.mean()),
        "reward/std_over_batch": float(batch.reward_mean.std(correction=0)),
        "reward/posterior_std": float(batch.reward_std.mean()),
        "reward/shaped": float(rewards.mean()),
        "kl/per_response": kl / len(rewards),
        "kl/coefficient": kl_coefficient,
        "response/tokens": float(batch.response_lengths.float().mean()),
        "response/stopped": float(1.0 - batch.was_cut.mean()),
        "response/repetition": float(batch.repetition.mean()),
    }


def engine_metrics(batch: RolloutTensors) -> Metrics:
    """`engine_gap/*`: how far the engine's log-probabilities are from the learner's, nats."""
    total, largest = 0.0, 0.0
    # In blocks that the cache holds: a step may have many millions of tokens.
    for engine, learner in zip(*(c.split(BLOCK_VALUES) for c in (batch.engine_logprobs, batch.logprobs)), strict=True):
        gap = (engine - learner).abs_()
        total, largest = total + _sum(gap), max(largest, float(gap.max()))
    return {"engine_gap/mean": total / len(batch.logprobs), "engine_gap/max": largest}


def importance_metrics(weights: torch.Tensor, *, cap: float) -> Metrics:
    """`importance/*`: the mean importance weight, and the share of tokens at the cap."""
    capped = int((weights >= cap).sum())
    return {"importance/mean": _sum(weights) / len(weights), "importance/capped": capped / len(weights)}


def critic_metrics(batch: RolloutTensors, returns: torch.Tensor) -> Metrics:
    """`value/mean` and `return/mean` over response tokens."""
    return {"value/mean": _sum(batch.values) / len(returns), "return/mean": _sum(returns) / len(returns)}


def _sum(values: torch.Tensor) -> float:
    # numpy adds float32 in float64 as it reads them; torch makes a copy in float64 first.
    return float(np.add.reduce(values.numpy(), dtype=np.float64))


def group_metrics(rewards: torch.Tensor, groups: torch.Tensor) -> Metrics:
    """`group/*` of [B] shaped rewards: their spread within a prompt, and the share of prompts without any."""
    tables = [rewards[rows] for rows in groups_by_size(groups)]
    return {
        "group/reward_std": float(torch.cat([table.std(-1) for table in tables]).mean()),
        "group/uniform": float(torch.cat([uniform_groups(table) for table in tables]).float().mean()),
    }
