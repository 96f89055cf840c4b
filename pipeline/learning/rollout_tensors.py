"""The tokens of one step as tensors, with what the engine and the learner said of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.columns import TokenEvaluations
from pipeline.ragged import Ragged


@dataclass(frozen=True, kw_only=True)
class RolloutTensors:
    """B responses with N tokens in all, end to end. Rows are ordered by prompt, then by sample."""

    offsets: torch.Tensor
    """[B + 1] int64: response b has the tokens from `offsets[b]` to `offsets[b + 1]`, one at least."""
    logprobs: torch.Tensor
    """[N] under the policy before the update, nats."""
    reference_logprobs: torch.Tensor
    """[N] under the frozen reference, nats."""
    engine_logprobs: torch.Tensor
    """[N] under the engine that sampled the token, nats."""
    values: torch.Tensor
    """[N] under the critic before the update."""

    @classmethod
    def of(cls, engine_logprobs: Ragged, evaluations: TokenEvaluations) -> RolloutTensors:
        """Of B responses, in the same order; shares the memory of their tokens."""
        return cls(
            offsets=engine_logprobs.offsets,
            logprobs=evaluations.logprobs.values,
            reference_logprobs=evaluations.reference_logprobs.values,
            engine_logprobs=engine_logprobs.values,
            values=evaluations.values.values,
        )
