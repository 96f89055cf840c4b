"""Objectives re-weighted at run time: a user steers a reward without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pipeline.errors import DataError

Factors = tuple[float, ...]
"""One factor an objective, in the order of the model."""


def reweighted(weights: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """w'_k = f_k w_k / sum_j f_j w_j.

    Renormalised, for three reasons. The weights are the model's softmax over objectives, and f then adds log f to its
    logits: w' is what the same model would say with another prior on the objectives. The reward stays a mean of the
    scores, so its units, its error bar and the scale that training divides by keep their meaning. Equal factors change
    nothing, whatever their size.

    Args:
        weights: [N, K] objective weights of each prompt, which add up to 1.
        factors: [N, K] f >= 0, not all 0 in a row.
    """
    products = weights * factors
    return products / products.sum(-1, keepdim=True)


def factors_of(weights: Mapping[str, float], objectives: Sequence[str], *, place: str) -> Factors | None:
    """The factors in the order of the objectives, 1 where none is named; None where equal factors change nothing.

    Raises:
        DataError: a name is no objective of the model, or every factor is 0.
    """
    unknown = sorted(weights.keys() - {*objectives})
    if unknown:
        raise DataError(
            f"{place}: weights name {unknown[0]!r:.80}, which is no objective of this model; its objectives are "
            f"{', '.join(objectives) or 'none'}"
        )
    factors = tuple(float(weights.get(name, 1.0)) for name in objectives)
    if factors and not any(factors):
        raise DataError(f"{place}: weights are 0 for every objective, which leaves no reward; give one of them a value")
    return None if len({*factors}) <= 1 else factors
