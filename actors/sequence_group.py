"""The ranks that compute a row together, over torch's process groups."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.models.sequence_parallel import SequenceGroup


class ProcessSequenceGroup:
    """A `SequenceGroup` of n consecutive ranks: most often neighbours on one node."""

    def __init__(self, processes: dist.ProcessGroup) -> None:
        self._processes = processes
        self.size = processes.size()
        self.rank = processes.rank()

    def all_to_all(self, pieces: torch.Tensor) -> torch.Tensor:
        arrived = torch.empty_like(pieces)
        dist.all_to_all_single(arrived, pieces, group=self._processes)
        return arrived

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._processes)
        return total


def join_sequence_group(size: int, *, timeout: timedelta) -> SequenceGroup | None:
    """This rank's group of `size`; None where each rank computes rows of its own. Collective over all ranks."""
    if size == 1:
        return None
    processes, _ = dist.new_subgroups(size, timeout=timeout)
    return ProcessSequenceGroup(processes)
