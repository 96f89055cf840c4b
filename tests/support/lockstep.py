"""Several ranks in one process: threads that meet at every collective, as ranks do, and break when one stays away."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch

from pipeline.learning.engine import TorchEngine
from pipeline.models.tensor_stream import TensorStream

L = TypeVar("L")
T = TypeVar("T")
PATIENCE_S = 60.0


class Meeting:
    """Where n ranks meet."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size, timeout=PATIENCE_S)
        self.brought: list[Any] = [None] * world_size

    def exchange(self, rank: int, kind: str, value: Any) -> list[Any]:
        """What every rank brought, in rank order; fails when ranks came for different reasons."""
        self.brought[rank] = (kind, value)
        self.barrier.wait()
        all_brought = list(self.brought)
        self.barrier.wait()
        kinds = {kind for kind, _ in all_brought}
        assert len(kinds) == 1, f"ranks are out of step: {kinds}"
        return [value for _, value in all_brought]


class LockstepEngine(TorchEngine):
    """One rank of several. Gradients add up over ranks; every forward is a collective, as under ZeRO-3."""

    def __init__(self, *args: Any, rank: int, meeting: Meeting, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rank, self.world_size, self.meeting = rank, meeting.world_size, meeting

    def forward(self, *args: Any) -> Any:
        self.meeting.exchange(self.rank, "forward", None)
        return super().forward(*args)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self.meeting.exchange(self.rank, f"backward, last {last}", None)
        super().backward(loss, last=last)

    def step(self, learning_rate_factor: float, *, resting: str | None = None) -> float:
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        everyone = self.meeting.exchange(self.rank, "step", own)
        for parameter, gradients in zip(parameters, zip(*everyone, strict=True), strict=True):
            parameter.grad = torch.stack(gradients).sum(0)
        return super().step(learning_rate_factor, resting=resting)

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.meeting.exchange(self.rank, "sum", tensor)).sum(0)

    def stream(self) -> TensorStream:
        self.meeting.exchange(self.rank, "stream", None)
        return super().stream()


def run_ranks(world_size: int, build: Callable[[Callable[..., LockstepEngine]], L], work: Callable[[L], T]) -> list[T]:
    """`work(build(make_engine))` on every rank at once; what each returned, in rank order.

    Learners are built one after the other: their initial weights come from torch's one global generator.
    """
    meeting = Meeting(world_size)
    learners = [build(partial(LockstepEngine, rank=rank, meeting=meeting)) for rank in range(world_size)]

    def run(learner: L) -> T:
        try:
            return work(learner)
        except BaseException:
            meeting.barrier.abort()  # the others must not wait for this one
            raise

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(run, learner) for learner in learners]
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    # The rank that failed tells more than those it left waiting.
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]
