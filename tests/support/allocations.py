"""How much memory tensors take while something runs."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_tensor_bytes(work: Callable[[], object]) -> int:
    """The most bytes that the CPU allocator of torch had given out during `work`, beyond those before it.

    Unlike the resident size it does not depend on the machine, on other processes, or on freed memory that is kept.
    What oneDNN takes for itself is not part of it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    taken = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            taken += event.nbytes()
            peak = max(peak, taken)
    return peak
