"""The error bar of a reward: draws of the head's last linear maps, part of every reward head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from pipeline.objectives.last_layer import (
    LastLayerInputs,
    Precision,
    bradley_terry_precision,
    last_layer_gradient,
    relative_to,
    sketched,
    unsketched_draws,
)

DRAWS = 64
"""L: the relative standard error of a variance is sqrt(2 / L) = 0.18, of a standard deviation 0.09."""


class ErrorBar(NamedTuple):
    """The last three fields of a `RewardOutput`."""

    deviations: torch.Tensor
    """[N, L]"""
    prompt_features: torch.Tensor
    """[N, G]"""
    response_features: torch.Tensor
    """[N, F]"""


def no_error_bar(rows: torch.Tensor) -> ErrorBar:
    """What N rows have in training: nothing."""
    empty = rows.new_zeros(len(rows), 0)
    return ErrorBar(empty, empty, empty)


class LastLayerPosterior(nn.Module):
    """Draws from the Laplace posterior of a head's last linear maps (`pipeline/objectives/last_layer.py`).

    u(x, y) = D^T (gradient of r(x, y) - r(x, y_0)),   sd[r] = |u|,   Cov[r_a, r_b] = <u_a, u_b>

    Before `RewardTrainer.calibrate` has filled the draws D, every standard deviation is 0. y_0 is the mean training
    response. Buffers belong to the checkpoint; no optimiser sees them.
    """

    draws: torch.Tensor
    """D, [P, L]."""
    reference_features: torch.Tensor
    """[F] mean response features."""
    reference_scores: torch.Tensor
    """[K] mean scores."""

    def __init__(
        self, *, response_size: int, prompt_size: int = 0, num_objectives: int = 0, draws: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        maps = num_objectives if prompt_size else 1
        unfilled = torch.zeros(maps * (response_size + prompt_size), DRAWS)
        self.register_buffer("draws", unfilled if draws is None else draws)
        self.register_buffer("reference_features", torch.zeros(response_size))
        self.register_buffer("reference_scores", torch.zeros(num_objectives))

    def forward(self, inputs: LastLayerInputs) -> ErrorBar:
        """The deviations u of N rewards, with the features that they come from."""
        relative = relative_to(inputs, self.reference_features, self.reference_scores)
        deviations = last_layer_gradient(relative) @ self.draws
        return ErrorBar(deviations, inputs.prompt_features, inputs.response_features)

    def fill(self, reference: LastLayerInputs, draws: torch.Tensor) -> None:
        """Sets the posterior.

        Args:
            reference: one row, the means over training responses.
            draws: [P, L].
        """
        self.draws.copy_(draws)
        self.reference_features.copy_(reference.response_features[0])
        self.reference_scores.copy_(reference.scores[0])


@dataclass(frozen=True, kw_only=True)
class LastLayerEvidence:
    """What training pairs say of the last maps, before a prior is chosen."""

    precision: Precision
    """Of the sketched maps."""
    reference: LastLayerInputs
    """One row: means over training responses."""
    num_pairs: int

    @classmethod
    def of(cls, batches: Iterable[tuple[LastLayerInputs, torch.Tensor]]) -> LastLayerEvidence:
        """Sums over batches of (inputs of 2B rows, chosen first; rewards [2B])."""
        matrix, total, num_pairs = None, None, 0
        for inputs, rewards in batches:
            margins = pair_differences(rewards.double())
            differences = pair_differences(last_layer_gradient(sketched(inputs)).double())
            term = bradley_terry_precision(differences, margins)
            sums = [field.double().sum(0, keepdim=True) for field in inputs]
            matrix = term if matrix is None else matrix + term
            total = sums if total is None else [a + b for a, b in zip(total, sums, strict=True)]
            num_pairs += len(margins)
        assert matrix is not None, "training has at least one batch"
        assert total is not None
        means = LastLayerInputs(*((field / (2 * num_pairs)).float() for field in total))
        return cls(precision=Precision.of(matrix), reference=means, num_pairs=num_pairs)

    def draws(self, inputs: LastLayerInputs, prior_precision: float) -> torch.Tensor:
        """[P, L] float32, over all features of the inputs."""
        return unsketched_draws(self.precision.draws(prior_precision, count=DRAWS), inputs).float()


def pair_differences(rows: torch.Tensor) -> torch.Tensor:
    """[2B, ...] chosen rows first -> [B, ...] chosen minus rejected."""
    chosen, rejected = rows.chunk(2)
    return chosen - rejected
