"""Decoders r = g(w, z) that are not linear in the features (VRM, arXiv 2603.04974, Eq. 12; docs/method.md section 2).

They cannot be taken apart into objective scores, and their posterior moments need samples. Neither has an output bias:
it would cancel in every pair. The linear decoders are a matrix, and live in `VRMHead` itself.

Shapes: leading dimensions *, K objectives, d semantic dimensions.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import silu


class MLPDecoder(nn.Module):
    """r = v^T SiLU(B SiLU(A [w; z] + a) + b): the most general one."""

    def __init__(self, num_objectives: int, semantic_dims: int, hidden_size: int) -> None:
        super().__init__()
        self.first = nn.Linear(num_objectives + semantic_dims, hidden_size, dtype=torch.float32)
        self.second = nn.Linear(hidden_size, hidden_size, dtype=torch.float32)
        self.output = nn.Linear(hidden_size, 1, bias=False, dtype=torch.float32)

    def forward(self, weights: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """[*, K] and [*, d] -> [*]."""
        x = torch.cat([weights, features], dim=-1)
        return self.output(silu(self.second(silu(self.first(x))))).squeeze(-1)


class FiLMDecoder(nn.Module):
    """r = v^T SiLU( (W_z z) * (1 + W_w w) ): the objective weights scale the features' hidden units.

    Source: feature-wise linear modulation without its shift, Perez et al. 2018, arXiv:1709.07871, Eq. 2.
    """

    def __init__(self, num_objectives: int, semantic_dims: int, hidden_size: int) -> None:
        super().__init__()
        self.features = nn.Linear(semantic_dims, hidden_size, bias=False, dtype=torch.float32)
        self.modulation = nn.Linear(num_objectives, hidden_size, bias=False, dtype=torch.float32)
        self.output = nn.Linear(hidden_size, 1, bias=False, dtype=torch.float32)

    def forward(self, weights: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """[*, K] and [*, d] -> [*]."""
        return self.output(silu(self.features(features) * (1.0 + self.modulation(weights)))).squeeze(-1)
