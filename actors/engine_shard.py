"""What every process of an engine can do beside vLLM's worker: the engine calls it by name, in all shards at once.

vLLM imports this module in each of them (`worker_extension_cls`), and so learns of our weight transfers there.
"""

from __future__ import annotations

from typing import Protocol

import torch

from actors.engine_weights import differences, holds_by_name, replace_weights
from actors.weight_transfer import register_all
from pipeline.learning.memory import copy_gb_per_s, resident_peak_gib
from pipeline.rollouts.policy_files import PolicyFiles

register_all()

FILES = PolicyFiles()
"""Of this process."""


class Worker(Protocol):
    """vLLM's worker, which the extension becomes a part of."""

    def get_model(self) -> torch.nn.Module:
        """This process's shard."""


class EngineShard:
    """Methods added to vLLM's worker. A location is the directory of a published policy."""

    def holds_published(self: Worker, location: str) -> bool:
        return holds_by_name(self.get_model(), FILES.read(location))

    def replace_by_published(self: Worker, location: str) -> None:
        replace_weights(self.get_model(), FILES.read(location))

    def differing_groups(self: Worker, location: str) -> dict[str, float]:
        return differences(self.get_model(), FILES.read(location))

    def copy_speed(self: Worker, num_bytes: int) -> float:
        """GB/s of a copy in the memory that holds the weights."""
        return copy_gb_per_s(num_bytes, next(self.get_model().parameters()).device)

    def peak_gib(self) -> float:
        """The largest resident size of this process."""
        return resident_peak_gib()
