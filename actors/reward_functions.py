"""Functions that score, in processes of their own: what a user wrote can hang or die without the run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
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


class FunctionProcess:
    """One process with the function in it."""

    def __init__(self, spec: FunctionSpec) -> None:
        self._function = LoadedFunction(spec)

    def is_ready(self) -> bool:
        """Whether the function could be imported; else the constructor has raised."""
        return True

    def score(self, rows: RewardRows) -> list[SourceScore]:
        return self._function.score(rows)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What a process is at: a batch, or its own start."""

    process: ActorHandle
    end: float
    """When it has taken too long, on the clock of `time.monotonic`."""
    number: int = 0
    batch: RewardRows | None = None


class FunctionProcesses:
    """Implements `RewardSource` with processes that share the batches of a step.

    A process that exceeds the deadline of its batch is ended, and one that died is gone; another one starts while the
    others go on. The batch is not tried again: its rows have failed, and the rule of the recipe answers for them.
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
        self._idle: list[ActorHandle] = []
        self._starting: dict[Any, _Call] = {}
        try:
            for _ in range(config.processes):
                self._start()
            while self._starting:
                self._take_started(_answered(self._starting))
        except BaseException:
            self.close()
            raise

    def score(self, rows: RewardRows) -> list[SourceScore]:
        """The scores of all batches, each from the first process that is free.

        Raises:
            DeadlineExceeded, WorkerDied: the successor of a process did not start.
        """
        waiting = list(enumerate(batches(rows, self._spec.batch_size)))[::-1]
        answers: dict[int, Sequence[SourceScore]] = {}
        running: dict[Any, _Call] = {}
        while waiting or running:
            while waiting and self._idle:
                process, (number, batch) = self._idle.pop(), waiting.pop()
                end = time.monotonic() + self._spec.deadline_s
                running[process.score.remote(batch)] = _Call(process=process, end=end, number=number, batch=batch)
            answered = _answered(running | self._starting)
            self._take_started(answered)
            now = time.monotonic()
            for answer in [answer for answer, call in running.items() if answer in answered or call.end <= now]:
                call = running.pop(answer)
                answers[call.number] = self._scores(call, answer if answer in answered else None)
        return [score for number in sorted(answers) for score in answers[number]]

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            ray.kill(process)
        self._processes, self._idle, self._starting = [], [], {}

    def _scores(self, call: _Call, answer: Any | None) -> Sequence[SourceScore]:
        """The answer to a batch, or why there is none; its process is free afterwards, or replaced.

        Args:
            answer: None where the deadline is over.
        """
        assert call.batch is not None
        if answer is None:
            ray.kill(call.process)
            self._replace(call.process)
            return failed(call.batch, "timed_out", f"no answer within deadline_s = {self._spec.deadline_s:g} s")
        try:
            scores = ray.get(answer, timeout=self._start_s)
        except ACTOR_DIED as error:
            self._replace(call.process)
            return failed(call.batch, "died", f"its process ended ({str(error).splitlines()[0]})")
        except RayTaskError as error:  # an answer that cannot travel, say
            scores = failed(call.batch, "exception", str(error.cause or error))
        self._idle.append(call.process)
        return scores

    # ------------------------------------------------------------------ start

    def _start(self) -> None:
        actor: Any = ray.remote(num_cpus=self._config.cpus_per_process, max_restarts=0)(FunctionProcess)
        process = actor.remote(self._spec)
        self._processes.append(process)
        self._starting[process.is_ready.remote()] = _Call(process=process, end=time.monotonic() + self._start_s)

    def _replace(self, process: ActorHandle) -> None:
        self.restarts += 1
        self._processes.remove(process)
        self._start()

    def _take_started(self, answered: Set[Any]) -> None:
        """Makes processes idle that are up."""
        place = f"alignment.rewards: {self._spec.name!r}"
        for answer in answered & self._starting.keys():
            try:
                ray.get(answer, timeout=self._start_s)
            except ACTOR_DIED as error:
                raise own_error(error) or WorkerDied(f"{place}: a process died while it started: {error}") from error
            self._idle.append(self._starting.pop(answer).process)
        late = [call for call in self._starting.values() if call.end <= time.monotonic()]
        if late:
            raise DeadlineExceeded(
                f"{place}: {len(late)} processes were not up within {self._start_s:g} s. Free CPUs for "
                "cluster.reward_functions, or raise cluster.deadlines.start_s."
            )


def _answered(calls: Mapping[Any, _Call]) -> Set[Any]:
    """All that have answered, as soon as one has, or as the first deadline is over."""
    answers = list(calls)
    left = min(call.end for call in calls.values()) - time.monotonic()
    ray.wait(answers, num_returns=1, timeout=max(0.0, left))
    # All of them: an answer that is there is never taken for a late one.
    return set(ray.wait(answers, num_returns=len(answers), timeout=0)[0])


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
