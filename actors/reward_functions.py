"""Functions that score, in processes of their own: what a user wrote can hang or die without the run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from actors.ray_errors import ACTOR_DIED
from pipeline.config.cluster import RewardFunctionsConfig
from pipeline.errors import ConfigError, DeadlineExceeded, PipelineError, WorkerDied
from pipeline.rewards.function_calls import LoadedFunction, failed
from pipeline.rewards.function_spec import FunctionSpec
from pipeline.rewards.in_process import batches
from pipeline.rewards.rows import RewardRows, SourceScore

POLL_S = 0.05
"""Longest wait for the next answer before the deadlines of the other batches are looked at."""


class FunctionProcess:
    """One process with the function in it."""

    def __init__(self, spec: FunctionSpec) -> None:
        self._function = LoadedFunction(spec)

    def is_ready(self) -> bool:
        """Whether the function could be imported; else the constructor has raised."""
        return True

    def score(self, rows: RewardRows) -> list[SourceScore]:
        return self._function.score(rows)


class FunctionProcesses:
    """Implements `RewardSource` with processes that share the batches of a step.

    A process that exceeds the deadline of its batch is ended, and one that died is gone; another takes its place. The
    batch is not tried again: its rows have failed, and the rule of the recipe answers for them.
    """

    def __init__(self, spec: FunctionSpec, config: RewardFunctionsConfig, *, start_s: float) -> None:
        """Starts the processes and waits until the function is imported.

        Raises:
            ConfigError: the function cannot be imported.
            DeadlineExceeded, WorkerDied: a process did not start.
        """
        self._spec = spec
        self._config = config
        self._start_s = start_s
        self.restarts = 0
        self._processes: list[ActorHandle] = []
        try:
            started = [self._new() for _ in range(config.processes)]
            self._processes = started
            self._wait_until_ready(started)
        except BaseException:
            self.close()
            raise

    def score(self, rows: RewardRows) -> list[SourceScore]:
        """The scores of all batches, each from the first process that is free."""
        waiting = list(enumerate(batches(rows, self._spec.batch_size)))[::-1]
        answers: dict[int, Sequence[SourceScore]] = {}
        idle = list(range(len(self._processes)))
        running: dict[Any, tuple[int, int, RewardRows, float]] = {}
        while waiting or running:
            while waiting and idle:
                place, (number, batch) = idle.pop(), waiting.pop()
                running[self._processes[place].score.remote(batch)] = (
                    place,
                    number,
                    batch,
                    time.monotonic() + self._spec.deadline_s,
                )
            done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_S)
            now = time.monotonic()
            for call in [*done, *(call for call, (*_, end) in running.items() if end <= now and call not in done)]:
                place, number, batch, _ = running.pop(call)
                answers[number] = self._answer(call, place, batch, is_done=call in done)
                idle.append(place)
        return [score for number in sorted(answers) for score in answers[number]]

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            ray.kill(process)
        self._processes = []

    def _answer(self, call: Any, place: int, batch: RewardRows, *, is_done: bool) -> Sequence[SourceScore]:
        if not is_done:
            ray.kill(self._processes[place])
            self._replace(place)
            return failed(batch, "timed_out", f"no answer within deadline_s = {self._spec.deadline_s:g} s")
        try:
            return ray.get(call, timeout=self._start_s)
        except ACTOR_DIED as error:
            self._replace(place)
            return failed(batch, "died", f"its process ended ({str(error).splitlines()[0]})")
        except RayTaskError as error:  # an answer that cannot travel, say
            return failed(batch, "exception", str(error.cause or error))

    def _replace(self, place: int) -> None:
        self.restarts += 1
        self._processes[place] = self._new()
        self._wait_until_ready([self._processes[place]])

    def _new(self) -> ActorHandle:
        actor: Any = ray.remote(num_cpus=self._config.cpus_per_process, max_restarts=0)(FunctionProcess)
        return actor.remote(self._spec)

    def _wait_until_ready(self, processes: Sequence[ActorHandle]) -> None:
        place = f"alignment.rewards: {self._spec.name!r}"
        calls: list[Any] = [process.is_ready.remote() for process in processes]
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=self._start_s)
        if len(ready) < len(calls):
            raise DeadlineExceeded(
                f"{place}: {len(calls) - len(ready)} processes were not up within {self._start_s:g} s. Free CPUs for "
                "cluster.reward_functions, or raise cluster.deadlines.start_s."
            )
        try:
            ray.get(calls, timeout=self._start_s)
        except ACTOR_DIED as error:
            raise own_error(error) or WorkerDied(f"{place}: a process died while it started: {error}") from error


def own_error(error: BaseException) -> PipelineError | None:
    """Our own error of a constructor, which Ray carries within the error of the actor."""
    cause = getattr(error, "cause", None) or error.__cause__
    while cause is not None and not isinstance(cause, PipelineError):
        cause = getattr(cause, "cause", None) or cause.__cause__
    if cause is not None:
        return cause
    for line in str(error).splitlines():
        _, found, message = line.partition("pipeline.errors.ConfigError: ")
        if found:
            return ConfigError(message)
    return None
