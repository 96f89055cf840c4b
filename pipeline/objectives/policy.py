"""The policy losses."""

from __future__ import annotations

import torch

from pipeline.objectives.masked import masked_sum, require_same_shape


def clipped_policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_range: float,
    num_tokens: int,
) -> torch.Tensor:
    """PPO clipped surrogate, negated for minimisation.

    L = -1/N * sum_t min(r_t * A_t, clip(r_t, 1 - eps, 1 + eps) * A_t),  r_t = pi(a_t|s_t) / pi_old(a_t|s_t)

    Source: Schulman et al. 2017, arXiv:1707.06347, Eq. 7; summed over tokens, divided by the step-wide count N.

    Args:
        logprobs: [B, T] natural log-probabilities under the current policy; carries gradient.
        old_logprobs: [B, T] the same tokens under the policy before this update; held fixed.
        advantages: [B, T] whitened over the batch, dimensionless.
        mask: [B, T] bool, True on response tokens.
        clip_range: eps > 0, dimensionless.
        num_tokens: N, response tokens in this optimiser step, over all shards and micro-batches.

    Returns:
        Scalar loss. Shard and micro-batch losses add up to the loss of the step.

    Raises:
        ShapeError: the four tensors differ in shape.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    ratio = importance_ratio(logprobs, old_logprobs, mask)
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return -masked_sum(torch.minimum(ratio * advantages, clipped * advantages), mask) / num_tokens


def importance_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """r_t = exp(log pi - log pi_old), [B, T]; 1 on padding, so that no infinity reaches the gradient."""
    return torch.exp(torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs)))


def clipped_tokens(
    ratio: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, *, clip_range: float
) -> torch.Tensor:
    """Number of tokens whose gradient the clip removes: the clipped term is the strict minimum. Scalar."""
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return masked_sum((clipped * advantages < ratio * advantages).to(ratio.dtype), mask)
