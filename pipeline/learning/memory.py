"""What a training rank needed at most."""

from __future__ import annotations

import resource
from collections.abc import Sequence

import torch

from pipeline.records import Metrics


def peak_memory(device: torch.device) -> Metrics:
    """`memory/rank_peak_gib`, the largest resident size of this process so far; on a GPU also
    `memory/device_peak_gib`, the most that tensors took of it."""
    peak = {"memory/rank_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if device.type == "cuda":
        peak["memory/device_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return peak


def largest(peaks: Sequence[Metrics]) -> Metrics:
    """Of each number the largest over ranks: the memory that one rank must be given."""
    return {name: max(peak[name] for peak in peaks) for name in peaks[0]}
