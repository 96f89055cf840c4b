"""Supervised fine-tuning of the policy before alignment."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.config.base import Count, Frozen
from pipeline.config.models import LoRAConfig, OptimiserConfig


class SFTConfig(Frozen):
    """Supervised fine-tuning of the policy; `num_steps: 0` uses the checkpoint as it is."""

    num_steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps; 0 trains nothing."""
    batch_size: Count = 64
    """Texts of an optimiser step, over all ranks."""
    max_tokens_per_micro_batch: Count = 8192
    """Tokens of one forward and backward pass of a rank; bounds its memory and changes no result."""
    max_length: Count = 1024
    """Longest text, in tokens. Longer ones are left out and counted."""
    lora: LoRAConfig | None = None
    """Train adapters; the result holds them merged."""
    optimiser: OptimiserConfig = OptimiserConfig(learning_rate=2e-5)
    eval_every: Count = 100
    """Optimiser steps between two evaluations on held-out texts."""
    checkpoint_every: Count = 100
    """Optimiser steps between two commits."""
