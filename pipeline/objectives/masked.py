"""Sums and means over the real entries of padded tensors."""

from __future__ import annotations

import torch

from pipeline.errors import ShapeError


def require_same_shape(**tensors: torch.Tensor) -> None:
    """Raises ShapeError, naming each tensor and its shape, unless all shapes are equal."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ShapeError("these tensors must have one shape: " + ", ".join(f"{n} {s}" for n, s in shapes.items()))


def masked_sum(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scalar sum of `x` where `mask` is True; padding may hold anything, even NaN."""
    require_same_shape(x=x, mask=mask)
    return torch.where(mask, x, 0.0).sum()


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scalar mean of `x` over the entries where `mask` is True; 0 when there are none."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def whiten(x: torch.Tensor, mask: torch.Tensor, *, keep_mean: bool = False, eps: float = 1e-8) -> torch.Tensor:
    """Zero mean, or the mean there was, and unit variance over the masked entries; 0 on padding.

    y = (x - mean) / sqrt(var + eps) [+ mean],  var with Bessel's correction, as in TRL's `masked_whiten`.

    Args:
        x: any shape; `mask` of the same shape, bool.
        keep_mean: add the mean again, as one does with rewards: their sign is what the policy learns from.
        eps: keeps a constant batch finite.
    """
    mean = masked_mean(x, mask)
    count = mask.sum()
    variance = masked_sum((x - mean) ** 2, mask) / (count - 1).clamp(min=1)
    whitened = (x - mean) * torch.rsqrt(variance + eps)
    return torch.where(mask, whitened + mean if keep_mean else whitened, 0.0)
