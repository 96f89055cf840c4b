"""Rollouts, their rewards and the learner's evaluation of them become the experience of one step."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.columns import EvaluatedRollouts
from pipeline.config.alignment import AlignmentConfig, PPOConfig
from pipeline.learning.algorithm import ADVANTAGES, ScoredTokens
from pipeline.learning.rollout_tensors import RolloutTensors
from pipeline.objectives.advantages import groups_by_size, token_rewards, uniform_groups
from pipeline.objectives.divergence import kl_estimate
from pipeline.objectives.masked import whiten
from pipeline.objectives.policy import truncated_importance_weights
from pipeline.ragged import BLOCK_VALUES, Ragged
from pipeline.records import CriticTargets, Experience, ExperienceSummary, Metrics, RewardedRows


def build_experience(
    evaluated: EvaluatedRollouts, rewarded: RewardedRows, config: AlignmentConfig, *, kl_coefficient: float
) -> tuple[Experience, Metrics]:
    """Estimates the advantages over the whole batch, and measures its tokens.

    Nothing here depends on how the batch is sharded later. Source: docs/method.md section 11.

    Args:
        evaluated: ordered by prompt, then by sample.
        rewarded: the rollouts to learn from (`reward_rows`). The others are left out before anything is computed.
        config: its sections `ppo` and `kl`.
        kl_coefficient: beta of this step.

    Returns:
        The experience; and `kl/*`, `engine_gap/*`, and where the recipe has them `importance/*`, `value/mean` and
        `return/mean` of all rewarded rollouts.
    """
    ppo, kl, rewards, groups = config.ppo, config.kl, rewarded.rewards, rewarded.groups
    # Of the rollouts the tokens alone: to select words costs more than to select numbers.
    engine_logprobs = evaluated.rollouts.logprobs.select(rewarded.rows)
    batch = RolloutTensors.of(engine_logprobs, evaluated.tokens.select(rewarded.rows))
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
    kept = rows_that_teach(rewards, groups) if ppo.drop_uniform_groups else torch.arange(len(rewards))

    def of_kept(column: torch.Tensor) -> torch.Tensor:
        """A view, where all rows stay."""
        return Ragged(column, batch.offsets).select(kept).values

    rows, taught = rewarded.rows[kept], of_kept(advantages)
    sequences = evaluated.rollouts.sequences.select(rows)
    experience = Experience(
        sequences=sequences,
        rows=tuple(rows.tolist()),
        offsets=sequences.response_ids.offsets,
        logprobs=of_kept(batch.logprobs),
        reference_logprobs=of_kept(batch.reference_logprobs),
        advantages=whiten(taught) if ppo.whiten_advantages else taught,
        importance_weights=None if weights is None else of_kept(weights),
        kl_loss_coefficient=loss_beta,
        critic=None if returns is None else CriticTargets(values=of_kept(batch.values), returns=of_kept(returns)),
        num_response_tokens=len(taught),
    )
    return experience, _measured(batch, ppo, kl_coefficient=kl_coefficient, returns=returns, weights=weights)


def summary_of(experience: Experience, metrics: Metrics) -> ExperienceSummary:
    """What the driver needs to know of an experience and of its metrics."""
    advantages = Ragged(experience.advantages, experience.offsets)
    return ExperienceSummary(
        metrics=metrics, rows=experience.rows, mean_advantages=advantages.sums() / advantages.lengths
    )


def _measured(
    batch: RolloutTensors,
    ppo: PPOConfig,
    *,
    kl_coefficient: float,
    returns: torch.Tensor | None,
    weights: torch.Tensor | None,
) -> Metrics:
    """What `build_experience` measures of all rewarded rollouts."""
    metrics = kl_metrics(batch, kl_coefficient=kl_coefficient) | engine_metrics(batch)
    if weights is not None and ppo.tis_cap is not None:
        metrics |= importance_metrics(weights, cap=ppo.tis_cap)
    if returns is not None:
        metrics |= critic_metrics(batch, returns)
    return metrics


# ------------------------------------------------------------------ advantages


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


def kl_metrics(batch: RolloutTensors, *, kl_coefficient: float) -> Metrics:
    """kl/per_response = mean_b sum_t (log pi - log pi_ref), the k1 estimate, whatever estimator is trained on."""
    kl = _sum(batch.logprobs) - _sum(batch.reference_logprobs)
    return {"kl/per_response": kl / (len(batch.offsets) - 1), "kl/coefficient": kl_coefficient}


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
