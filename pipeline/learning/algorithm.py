"""What an algorithm of the PPO family is made of: where advantages come from, the loss of a token, the average.

The names in a recipe's `alignment.ppo` are the keys of the four tables here; the mathematics is in
`pipeline/objectives`. A new algorithm is a new row, and a name for the combination in `pipeline/config/algorithms.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from pipeline.config.alignment import KLConfig, PPOConfig
from pipeline.objectives.advantages import (
    generalized_advantages,
    group_centred,
    group_zscores,
    in_groups,
    leave_one_out,
    rewards_to_go,
)
from pipeline.objectives.aggregation import MiniBatchSize, fixed_length_mean, sequence_mean, token_mean
from pipeline.objectives.divergence import kl_estimate
from pipeline.objectives.policy import (
    bounded_weights,
    cispo_surrogate,
    clipped_surrogate,
    clipped_tokens,
    geometric_mean_ratio,
    importance_ratio,
    product_ratio,
)
from pipeline.ragged import Ragged, in_padded_blocks

# ------------------------------------------------------------------ advantages


@dataclass(frozen=True, kw_only=True)
class ScoredTokens:
    """Everything that an estimator of advantages may use."""

    rewards: Ragged
    """Token rewards of B responses, N tokens in all."""
    values: Ragged
    """Under the critic; 0 without one."""
    groups: torch.Tensor
    """[B] int64: rows with one number answer the same prompt. They are neighbours."""


def _from_the_critic(tokens: ScoredTokens, ppo: PPOConfig) -> torch.Tensor:
    estimate = partial(generalized_advantages, gamma=ppo.discount, lam=ppo.gae_lambda)
    return in_padded_blocks(estimate, tokens.rewards, tokens.values)


def _from_token_rewards(tokens: ScoredTokens, ppo: PPOConfig) -> torch.Tensor:
    return in_padded_blocks(partial(rewards_to_go, gamma=ppo.discount), tokens.rewards)


def _from_the_group(
    compare: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[ScoredTokens, PPOConfig], torch.Tensor]:
    """Every token of a response has the advantage of the response, whose reward is the sum of its token rewards."""

    def advantages(tokens: ScoredTokens, ppo: PPOConfig) -> torch.Tensor:
        per_response = in_groups(compare, tokens.rewards.sums().float(), tokens.groups)
        return per_response.repeat_interleave(tokens.rewards.lengths)

    return advantages


ADVANTAGES: dict[str, Callable[[ScoredTokens, PPOConfig], torch.Tensor]] = {
    "gae": _from_the_critic,
    "rewards_to_go": _from_token_rewards,
    "group_zscore": _from_the_group(group_zscores),
    "group_centred": _from_the_group(group_centred),
    "leave_one_out": _from_the_group(leave_one_out),
}
"""[N] advantages, not whitened."""


# ------------------------------------------------------------------ the loss

RATIOS = {"token": importance_ratio, "geometric_mean": geometric_mean_ratio, "product": product_ratio}


class Surrogate(NamedTuple):
    per_token: torch.Tensor
    """[B, T], to be maximised."""
    num_bounded: torch.Tensor
    """Scalar: tokens on which a bound is in force."""


def _clip(
    ratio: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, ppo: PPOConfig
) -> Surrogate:
    high, dual = ppo.upper_clip_range, ppo.dual_clip_ratio
    return Surrogate(
        clipped_surrogate(ratio, advantages, clip_low=ppo.clip_range, clip_high=high, dual_clip=dual),
        clipped_tokens(ratio.detach(), advantages, mask, clip_range=ppo.clip_range, clip_high=high, dual_clip=dual),
    )


def _cispo(
    ratio: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, ppo: PPOConfig
) -> Surrogate:
    low, high = ppo.clip_range, ppo.upper_clip_range
    return Surrogate(
        cispo_surrogate(ratio, logprobs, advantages, clip_low=low, clip_high=high),
        bounded_weights(ratio.detach(), mask, clip_low=low, clip_high=high),
    )


SURROGATES = {"clip": _clip, "cispo": _cispo}

AVERAGES = {"token_mean": token_mean, "sequence_mean": sequence_mean, "fixed_length": fixed_length_mean}


@dataclass(frozen=True, kw_only=True)
class SampledTokens:
    """The tokens of B responses as the update found them; held fixed while the policy moves."""

    logprobs: torch.Tensor
    """[B, T] under the policy before the update."""
    reference_logprobs: torch.Tensor
    """[B, T] under the frozen reference."""
    advantages: torch.Tensor
    """[B, T] dimensionless."""
    importance_weights: torch.Tensor
    """[B, T] dimensionless; 1 where the recipe does not correct for who sampled the token."""
    mask: torch.Tensor
    """[B, T] bool, True on response tokens."""


class PolicyLoss(NamedTuple):
    """This shard's share of the loss of an optimiser step: shares add up."""

    surrogate: torch.Tensor
    """Scalar, to be minimised."""
    kl: torch.Tensor
    """Scalar: average KL to the reference, nats, not yet weighed by beta."""
    num_bounded: torch.Tensor
    """Scalar count of tokens."""


def policy_loss(
    logprobs: torch.Tensor, tokens: SampledTokens, *, ppo: PPOConfig, kl: KLConfig, size: MiniBatchSize
) -> PolicyLoss:
    """-average(w * surrogate(ratio, A)) and average(KL), in the recipe's choice of ratio, surrogate and average.

    With the defaults the first is `clipped_policy_loss`. The importance weight w corrects for who sampled the token.
    The KL is measured on the token as it is, so w leaves it alone (as in TRL).

    Args:
        logprobs: [B, T] under the current policy; carries gradient.
        tokens: what is fixed, of the same B responses.
        size: size of the whole mini-batch, over all shards.
    """
    average = AVERAGES[ppo.aggregation]
    ratio = RATIOS[ppo.ratio](logprobs, tokens.logprobs, tokens.mask)
    surrogate = SURROGATES[ppo.surrogate](ratio, logprobs, tokens.advantages, tokens.mask, ppo)
    return PolicyLoss(
        surrogate=-average(tokens.importance_weights * surrogate.per_token, tokens.mask, size),
        kl=average(kl_estimate(logprobs, tokens.reference_logprobs, kl.estimator), tokens.mask, size),
        num_bounded=surrogate.num_bounded,
    )
