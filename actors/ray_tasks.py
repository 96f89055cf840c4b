"""Work of an experiment or a stage as Ray tasks, each a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError, WorkerCrashedError

from actors.ray_errors import ACTOR_DIED
from cluster.resources import Demand
from pipeline.data.recipe_files import DATA_ROOT
from pipeline.errors import PipelineError, WorkerDied

WAIT_S = 60.0
"""Longest single wait for Ray. How long a training takes nobody can say beforehand, so the wait is repeated."""

RunOutcome = dict[str, Any] | PipelineError
"""Plain data that a task returned, or the error that ended it."""


@dataclass(frozen=True, kw_only=True)
class ProcessResources:
    """What the process of a run may use."""

    cpus: float
    gpus: float
    data_root: str
    """Where relative data paths start; a Ray task does not inherit the environment of the job."""

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    def apply(self) -> None:
        """Makes this process keep to it."""
        import torch

        from pipeline.learning.memory import keep_freed_memory

        os.environ[DATA_ROOT] = self.data_root
        torch.set_num_threads(max(1, int(self.cpus)))
        keep_freed_memory(torch.device(self.device))


def as_remote_tasks(demand: Demand, max_restarts: int) -> tuple[Callable[..., Any], ProcessResources]:
    """What makes a function a Ray task that holds the demand, and what the task's process may then use."""
    options = {"num_cpus": demand.cpus, "num_gpus": demand.gpus, "max_retries": max_restarts}
    resources = ProcessResources(cpus=demand.cpus, gpus=demand.gpus, data_root=os.environ.get(DATA_ROOT, ""))
    return lambda function, **others: ray.remote(function).options(**options, **others), resources


def outcomes_as_they_end(tasks: dict[ray.ObjectRef, int]) -> Iterator[tuple[int, RunOutcome]]:
    """(index of a task, its outcome), the task that ends first is the first. Tasks that are not read are cancelled."""
    try:
        while tasks:
            done, _ = ray.wait(list(tasks), num_returns=1, timeout=WAIT_S)
            for task in done:
                yield tasks.pop(task), _outcome(task)
    finally:
        for task in tasks:
            ray.cancel(task, force=True)


def outcomes_of_streams(streams: dict[ray.ObjectRefGenerator, int]) -> Iterator[tuple[int, Any]]:
    """(index of a task, what it yielded or the error that ended it), of tasks that yield on their way."""
    try:
        while streams:
            ready, _ = ray.wait(list(streams), num_returns=1, timeout=WAIT_S)
            stream: Any  # ray.wait is annotated for references alone
            for stream in ready:
                if (reference := next(stream, None)) is None:
                    del streams[stream]
                else:
                    yield streams[stream], _outcome(reference)
    finally:
        for stream in streams:
            ray.cancel(stream, force=True)


def _outcome(finished: ray.ObjectRef) -> RunOutcome:
    try:
        return ray.get(finished, timeout=WAIT_S)
    except RayTaskError as error:
        if isinstance(error.cause, PipelineError):
            return error.cause
        raise
    except (*ACTOR_DIED, WorkerCrashedError) as error:
        return WorkerDied(f"its process died, most often for want of memory: {error}. The same command runs it again.")
