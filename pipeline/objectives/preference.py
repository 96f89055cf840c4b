"""The Bradley-Terry likelihood of a comparison."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


def bradley_terry_loss(margins: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood that the chosen response wins.

    L_b = -log sigmoid(r(x, y_w) - r(x, y_l))

    Source: VRM, arXiv 2603.04974, Eqs. 1 and 12.

    Args:
        margins: [B] reward of the chosen minus reward of the rejected response, float32.

    Returns:
        [B] losses in nats; ln 2 when the model says nothing.
    """
    return -F.logsigmoid(margins)


def pair_accuracy(margins: torch.Tensor) -> torch.Tensor:
    """[B] 1 where the chosen response scores strictly higher; a tie is an error (RewardBench's rule)."""
    return (margins > 0).to(torch.float32)


def probit_preference(mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """P(y_w > y_l) under a Gaussian posterior of the margin: sigmoid(E / sqrt(1 + pi/8 * Var)).

    Source: MacKay 1992's approximation, as in vrm_spec section 8. Any shape; variance >= 0.
    """
    return torch.sigmoid(mean / torch.sqrt(1.0 + math.pi / 8.0 * variance))
