"""From one number per token to one loss: three ways to average, each with the denominator of the whole mini-batch.

Every function returns a share. The shares of all shards and micro-batches add up to the average over the mini-batch,
because the denominators are counted before the mini-batch is divided.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.objectives.masked import masked_sum, require_same_shape


@dataclass(frozen=True, kw_only=True)
class MiniBatchSize:
    """What one optimiser step averages over, counted over all shards and micro-batches."""

    num_tokens: int
    """Response tokens."""
    num_responses: int
    """Responses, of all lengths."""
    max_response_tokens: int
    """The longest response the sampler allows."""


def token_mean(x: torch.Tensor, mask: torch.Tensor, size: MiniBatchSize) -> torch.Tensor:
    """1/N * sum_{b,t} x_bt over the N tokens of the mini-batch: every token counts the same.

    Source: Yu et al. 2025 (DAPO), arXiv:2503.14476, Eq. 12; PPO's average, too.

    Args:
        x: [B, T]; anything on padding.
        mask: [B, T] bool, True on response tokens.
        size: size of the whole mini-batch, of which these B rows are a part.
    """
    return masked_sum(x, mask) / size.num_tokens


def sequence_mean(x: torch.Tensor, mask: torch.Tensor, size: MiniBatchSize) -> torch.Tensor:
    """1/B * sum_b 1/|o_b| * sum_t x_bt: every response counts the same, so a token of a long one counts less.

    Source: Shao et al. 2024 (GRPO), arXiv:2402.03300, Eq. 3. Arguments as in `token_mean`.
    """
    require_same_shape(x=x, mask=mask)
    per_sequence = torch.where(mask, x, torch.zeros_like(x)).sum(-1) / mask.sum(-1)
    return per_sequence.sum() / size.num_responses


def fixed_length_mean(x: torch.Tensor, mask: torch.Tensor, size: MiniBatchSize) -> torch.Tensor:
    """1/(B * L_max) * sum_{b,t} x_bt: a constant denominator, so that length shifts no token's weight.

    Source: Liu et al. 2025 (Dr. GRPO), arXiv:2503.20783, section 3; the constant is the sampler's limit, as in their
    code. Arguments as in `token_mean`.
    """
    return masked_sum(x, mask) / (size.num_responses * size.max_response_tokens)
