"""What a training rank needed of memory at most, and how fast memory is."""

from __future__ import annotations

import resource
import time
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


def free_cached_memory(device: torch.device) -> None:
    """Gives other processes on the GPU what tensors of this one no longer take."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def copy_gb_per_s(num_bytes: int, device: torch.device, *, rounds: int = 3) -> float:
    """How fast one thread, or the GPU, copies so many bytes within the device's memory: no transfer is faster."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return num_bytes / 1e9 / best
