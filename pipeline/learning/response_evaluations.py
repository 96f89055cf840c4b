"""The learner's view of rollouts: checked token by token, then a number or two a response for the driver."""

from __future__ import annotations

import math

import numpy as np
import torch

from pipeline.columns import Rollouts, TokenEvaluations
from pipeline.errors import ShapeError
from pipeline.learning.rewarded_rows import name_of, refuse_not_finite
from pipeline.records import ResponseEvaluations


def response_evaluations(rollouts: Rollouts, tokens: TokenEvaluations) -> ResponseEvaluations:
    """What the driver needs to know of the evaluation of B rollouts.

    Raises:
        ShapeError: rollouts and evaluation, or the tokens of one rollout, do not fit each other.
        NumericsError: an evaluation, or an engine's log-probability, is not finite.
    """
    require_usable(rollouts, tokens)
    gaps = np.abs(rollouts.logprobs.values.numpy() - tokens.logprobs.values.numpy())
    return ResponseEvaluations(
        log_ratios=tokens.logprobs.sums() - tokens.reference_logprobs.sums(),
        engine_gaps=torch.from_numpy(np.maximum.reduceat(gaps, rollouts.logprobs.offsets[:-1].numpy())),
    )


def require_usable(rollouts: Rollouts, tokens: TokenEvaluations) -> None:
    """Finds a bad row while it still has a name; later it would be a gradient that is NaN.

    Raises:
        ShapeError, NumericsError: as `response_evaluations`.
    """
    if not len(rollouts) == len(tokens) > 0:
        raise ShapeError(f"{len(rollouts)} rollouts and {len(tokens)} evaluations")
    columns = {
        "engine logprobs": rollouts.logprobs,
        "learner logprobs": tokens.logprobs,
        "reference logprobs": tokens.reference_logprobs,
        "values": tokens.values,
    }
    offsets = rollouts.response_ids.offsets
    is_usable = (
        bool((offsets.diff() > 0).all())
        and all(torch.equal(column.offsets, offsets) for column in columns.values())
        and all(_all_finite(column.values) for column in columns.values())
    )
    if is_usable:
        return
    for row in range(len(rollouts)):
        lengths = {"response tokens": len(rollouts.response_ids[row])}
        lengths |= {what: len(column[row]) for what, column in columns.items()}
        if len(set(lengths.values())) > 1 or not lengths["response tokens"]:
            counts = ", ".join(f"{length} {what}" for what, length in lengths.items())
            raise ShapeError(f"{name_of(rollouts, row)}: {counts}")
        for what, column in columns.items():
            refuse_not_finite(rollouts, row, what, column[row].tolist())


def _all_finite(values: torch.Tensor) -> bool:
    # A float64 cannot overflow by adding float32, so the sum is finite where all numbers are. It needs no memory.
    return math.isfinite(np.add.reduce(values.numpy(), dtype=np.float64))
