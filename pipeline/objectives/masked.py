"""Sums over the real entries of padded tensors, and whitening."""

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


def whiten(x: torch.Tensor, *, keep_mean: bool = False, eps: float = 1e-8) -> torch.Tensor:
    """Zero mean, or the mean there was, and unit variance.

    y = (x - mean) / sqrt(var + eps) [+ mean],  var with Bessel's correction, as in TRL's `masked_whiten`. Mean and
    variance are accumulated in float64.

    Args:
        x: [N] float32.
        keep_mean: add the mean again, as one does with rewards: their sign is what the policy learns from.
        eps: keeps a constant batch finite.
    """
    variance, mean = torch.var_mean(x, correction=min(1, len(x) - 1))
    whitened = (x - mean).mul_(torch.rsqrt(variance + eps))
    return whitened.add_(mean) if keep_mean else whitened
