"""The learning rate as a pure function of the step, so that a checkpoint needs no scheduler state."""

from __future__ import annotations

import math
from dataclasses import dataclass


def learning_rate_factor(step: int, *, num_steps: int, warmup_fraction: float) -> float:
    """Linear warm-up, then cosine decay to zero; multiplies the peak learning rate.

    f(s) = (s + 1) / W                                  for s < W,  W = ceil(warmup_fraction * num_steps)
    f(s) = (1 + cos(pi * (s - W) / (num_steps - W))) / 2   afterwards

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983, Eq. 5 without restarts.

    Args:
        step: 0-based index of the optimiser step.
        num_steps: optimiser steps of the whole run.
        warmup_fraction: share of the run spent warming up, in [0, 1].

    Returns:
        A factor in [0, 1]; the first step never gets 0.
    """
    warmup_steps = math.ceil(warmup_fraction * num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def warmup_factor(step: int, *, num_steps: int, warmup_fraction: float) -> float:
    """Linear ramp from 0 at the first step to 1 at `warmup_fraction` of the run, then 1 (docs/method.md section 3)."""
    warmup_steps = warmup_fraction * num_steps
    return 1.0 if step >= warmup_steps else step / warmup_steps


@dataclass(frozen=True, kw_only=True)
class LearningRateSchedule:
    """`learning_rate_factor` of one run."""

    num_steps: int
    """Optimiser steps of the whole run."""
    warmup_fraction: float
    """Share of the run spent warming up."""

    def factor(self, step: int) -> float:
        """Multiplies the peak learning rate of a step."""
        return learning_rate_factor(step, num_steps=self.num_steps, warmup_fraction=self.warmup_fraction)
