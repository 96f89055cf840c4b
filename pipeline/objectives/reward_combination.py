"""Several rewards of one response become one: their weighted sum, or the sum of what each says within a group."""

from __future__ import annotations

import torch

from pipeline.errors import ShapeError
from pipeline.objectives.masked import require_same_shape


def weighted_sum(
    means: torch.Tensor,
    stds: torch.Tensor,
    weights: torch.Tensor,
    *,
    heldout_means: torch.Tensor,
    heldout_stds: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """R = sum_s w_s (r_s - m_s) / d_s, with the standard deviation sqrt(sum_s (w_s u_s / d_s)^2).

    m_s and d_s are mean and standard deviation of source s over held-out responses. A weight of 2 therefore counts
    twice as much as a weight of 1, whatever the units of the two sources. Errors of different sources count as
    independent.

    Args:
        means, stds: [B, S] what each source says of each response, and its own error bar u; 0 where it has none.
        weights: [S] w >= 0.
        heldout_means, heldout_stds: [S] m, and d > 0.

    Returns:
        Two [B] tensors, in units of a held-out standard deviation.

    Raises:
        ShapeError: `means` and `stds` differ in shape.
    """
    require_same_shape(means=means, stds=stds)
    factors = weights / heldout_stds
    return ((means - heldout_means) * factors).sum(-1), (stds * factors).square().sum(-1).sqrt()


def group_decoupled(
    means: torch.Tensor, weights: torch.Tensor, groups: torch.Tensor, *, eps: float = 1e-4
) -> torch.Tensor:
    """A = sum_s w_s (r_s - mean_G r_s) / (sd_G r_s + eps): each source is normalised in its group before the sum.

    Two responses that differ in one source alone keep a distance that the spread of the other sources cannot hide.

    Source: Liu et al. 2026 (GDPO), arXiv:2601.05242, with the weights inside the sum. The normalisation over the batch
    that follows there is `alignment.ppo.whiten_advantages`. sd with Bessel's correction and eps outside the root, as in
    `group_zscores`.

    Args:
        means: [B, S] what each source says of each response.
        weights: [S] w >= 0.
        groups: [B] int64: rows with one number answer the same prompt. They need not be neighbours.
        eps: in units of a source.

    Returns:
        [B], of mean 0 in every group; 0 in a group of one.

    Raises:
        ShapeError: not one group number a row.
    """
    if groups.shape != means.shape[:1]:
        raise ShapeError(f"{list(groups.shape)} group numbers for rewards of shape {list(means.shape)}")
    result = torch.zeros_like(means[:, 0])
    for group in groups.unique():
        rows = groups == group
        if int(rows.sum()) > 1:
            of_group = means[rows]
            normalised = (of_group - of_group.mean(0)) / (of_group.std(0) + eps)
            result[rows] = normalised @ weights
    return result
