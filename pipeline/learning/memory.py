"""Memory of a process that computes: keeping freed memory, the peak, the speed of a copy."""

from __future__ import annotations

import ctypes
import resource
import time
from collections.abc import Sequence

import torch

from pipeline.records import Metrics

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Names that malloc.h gives to two of glibc's settings."""


def keep_freed_memory(device: torch.device) -> None:
    """Makes a process with tensors in host memory keep the memory that they free, for the next tensors.

    glibc maps a large block at its allocation and unmaps it when it is freed. So the kernel has to find and zero the
    pages of every activation of every layer. On a virtual machine this takes a third of the time of a small model.
    After this call blocks come from the heap, which never shrinks. Other C libraries are not changed.
    """
    if device.type != "cpu":
        return  # only whole models pass through host memory there, and only once
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)


def peak_memory(device: torch.device) -> Metrics:
    """`memory/rank_peak_gib`, the largest resident size of this process so far; on a GPU also
    `memory/device_peak_gib`, the most memory that tensors took on it."""
    peak = {"memory/rank_peak_gib": resident_peak_gib()}
    if device.type == "cuda":
        peak["memory/device_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return peak


def resident_peak_gib() -> float:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def largest(peaks: Sequence[Metrics]) -> Metrics:
    """The largest of each number over ranks: the memory that every rank must have."""
    return {name: max(peak[name] for peak in peaks) for name in peaks[0]}


def free_cached_memory(device: torch.device) -> None:
    """Returns the memory of freed tensors to the GPU, for other processes on it."""
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
