"""The critic's loss."""

from __future__ import annotations

import torch

from pipeline.objectives.masked import masked_sum, require_same_shape


def clipped_value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_range: float | None,
    num_tokens: int,
) -> torch.Tensor:
    """Clipped squared error of the critic.

    L = 1/(2N) * sum_t max((V_t - R_t)^2, (clip(V_t, Vold_t - eps, Vold_t + eps) - R_t)^2)

    Source: docs/method.md section 11, after Schulman et al.'s PPO2 implementation; N as in `clipped_policy_loss`.

    Args:
        values: [B, T] current values; carries gradient.
        old_values: [B, T] values before this update; held fixed.
        returns: [B, T] targets.
        mask: [B, T] bool, True on response tokens.
        clip_range: eps > 0 in units of the return, or None for the plain squared error.
        num_tokens: N, response tokens in this optimiser step, over all shards and micro-batches.

    Returns:
        Scalar loss. Shard and micro-batch losses add up.

    Raises:
        ShapeError: the four tensors differ in shape.
    """
    require_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    error = (values - returns) ** 2
    if clip_range is not None:
        clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
        error = torch.maximum(error, (clipped - returns) ** 2)
    return 0.5 * masked_sum(error, mask) / num_tokens
