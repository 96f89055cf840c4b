"""Supervised fine-tuning of the policy before alignment."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.config.base import Count, Frozen
from pipeline.config.models import LoRAConfig, OptimiserConfig


class SFTConfig(Frozen):
    """Supervised fine-tuning of the policy; `num_steps: 0` uses the checkpoint as it is."""

    num_steps: Annotated[int, Field(ge=0)] = 0
    batch_size: Count = 64
    max_tokens_per_micro_batch: Count = 8192
    max_length: Count = 1024
    lora: LoRAConfig | None = None
    """Train adapters; the result holds them merged."""
    optimiser: OptimiserConfig = OptimiserConfig(learning_rate=2e-5)
    eval_every: Count = 100
    checkpoint_every: Count = 100
