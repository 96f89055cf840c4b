"""The rollout workers of a job: start, join, replace and end them, and bring policies into their engines."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from actors.ray_errors import ACTOR_DIED
from actors.worker_handle import EngineSettings, WorkerActors, WorkerHandle, start_worker
from cluster.engine_build import ResolvedRolloutConfig
from pipeline.config.cluster import DeadlinesConfig
from pipeline.errors import DeadlineExceeded, PipelineError, TransferFailed
from pipeline.records import Metrics, PolicyWeights
from pipeline.rollouts.worker_failures import (
    FailureKind,
    Standing,
    WorkerCall,
    WorkerFailure,
    deadline_exceeded,
    decide_on_failure,
    worker_died,
)

logger = logging.getLogger(__name__)

SLICE_S = 0.5
"""How long an engine decodes before it can be told something else: new requests, new weights, or to go on."""
WORKER_ERRORS = (*ACTOR_DIED, RayTaskError, PipelineError)
"""What a call to a worker can raise: the worker died, its code failed, or it said what is wrong."""


class PolicySender(Protocol):
    """The learner's ranks, as far as they can send their weights without a file."""

    def send(self, workers: Mapping[str, Any]) -> None:
        """Sends the published policy into the engines of these idle workers, name -> Ray handle.

        Raises TransferFailed when any of them did not take it.
        """


class RolloutFleet:
    """Workers that serve, each with an engine that holds the current policy, and workers that are about to join.

    The fleet samples nothing, and it has no lock of its own. Two threads use it in turns: each holds
    `BatchSampler.turn` while it changes which workers there are.
    """

    def __init__(
        self, engine: EngineSettings, config: ResolvedRolloutConfig, deadlines: DeadlinesConfig, actors: WorkerActors
    ) -> None:
        """Holds no worker yet; `resize` starts the first ones."""
        self.workers: list[WorkerHandle] = []
        """The workers that serve."""
        self.joining: list[WorkerHandle] = []
        """The workers that start while the others sample. They hold no policy yet."""
        self.policy: PolicyWeights | None = None
        """The policy that the engines hold."""
        self._engine = engine
        self._config = config
        self._deadlines = deadlines
        self._actors = actors
        self._sender: PolicySender | None = None
        self._restarts_left = config.max_restarts
        self._num_started = 0

    # ------------------------------------------------------------------ how many

    def resize(self, num_workers: int) -> None:
        """Ends the last workers, or starts more. With a policy, it waits until the new ones hold it."""
        while len(self.workers) > num_workers:
            self.workers.pop().end()
        joining = self._start_workers(num_workers - len(self.workers))
        if joining and self.policy is not None:
            joining, _ = self._load(joining, self.policy)
        self.workers += joining

    def follow(self, wanted: int | None, *, may_grow: bool, patience_s: float) -> list[WorkerHandle]:
        """Shrinks at once; grows without waiting: a worker that starts while others sample joins at a later update.

        Args:
            wanted: the size asked for from outside; None changes nothing.
            may_grow: False where this size was tried before, in vain.
            patience_s: how long a worker may take to start.

        Returns:
            Those that `join` shall take in now, and those that have had no place to start for too long.
        """
        if wanted is None:
            return []
        while self.joining and len(self.workers) + len(self.joining) > wanted:
            self.joining.pop().end()
        while len(self.workers) > wanted:
            self.workers.pop().end()
        if may_grow:
            self.joining += self._start_workers(wanted - len(self.workers) - len(self.joining))
        overdue = time.monotonic() - patience_s
        return [worker for worker in self.joining if worker.requested_at < overdue or worker.has_started]

    def join(self, joining: Sequence[WorkerHandle], weights: PolicyWeights) -> tuple[list[Metrics], bool]:
        """Takes in those that load the published policy and pass the gate; the others are dropped with a warning.

        Waits for the loads, each at most `cluster.deadlines.weights_s`.

        Returns:
            The metrics of those that joined, and whether any was dropped.
        """
        doing = _loading(weights)
        replies = [
            (worker, worker.actor.load_weights.remote(weights, self._engine.gate_tolerance)) for worker in joining
        ]
        metrics, is_any_dropped = [], False
        for worker, reply in replies:
            try:
                if not worker.has_started:
                    raise self.deadline_exceeded(worker, "start()", self._deadlines.start_s)
                self.answer(worker, worker.started, "start()", self._deadlines.start_s)
                metrics.append(self.answer(worker, reply, doing, self._deadlines.weights_s))
            except WORKER_ERRORS as error:
                self._carry_out(worker, self._failure(worker, "load_weights", error, standing="joining"))
                is_any_dropped = True
                logger.warning("%s, asked for from outside, did not join: %s", worker.name, error)
            else:
                self.workers.append(worker)
            self.joining.remove(worker)
        return metrics, is_any_dropped

    def end(self) -> None:
        """Kills every worker, and replaces none from here on: not even for a thread that waits for one right now."""
        self._restarts_left = 0
        for worker in (*self.workers, *self.joining):
            worker.end()

    def forget(self) -> None:
        """Empties the fleet after `end`, once no thread uses it any more."""
        self.workers, self.joining = [], []

    # ------------------------------------------------------------------ policies

    @contextmanager
    def fed_by(self, sender: PolicySender) -> Iterator[None]:
        """Within it, engines that can take weights from the learner's GPUs do; the sender sends what is published."""
        self._sender = None if self._engine.plan.weight_transfer == "shm" else sender
        try:
            yield
        finally:
            self._sender = None

    @property
    def shares_gpus(self) -> bool:
        return self._engine.plan.placement != "disaggregated"

    def sleep(self) -> None:
        """Makes every engine leave its GPU; a worker whose engine does not is ended, and found dead at the next load.

        Waits until all have started, and for each answer at most `cluster.deadlines.start_s`.
        """
        self.workers = [self._started(worker) for worker in self.workers]
        replies = [(worker, worker.actor.sleep.remote()) for worker in (*self.workers, *self.joining)]
        for worker, asleep in replies:
            try:
                # One that joins has to start first.
                self.answer(worker, asleep, "sleep()", self._deadlines.start_s)
            except WORKER_ERRORS as error:
                self._carry_out(worker, self._failure(worker, "sleep", error))
                logger.warning("%s is ended: it did not leave its GPU to the learner. %s", worker.name, error)

    def load_weights(self, weights: PolicyWeights) -> tuple[list[Metrics], bool | None]:
        """Brings a policy into every serving engine and through the gate; dead and hanging workers are replaced.

        Waits for the slowest engine, and for each at most `cluster.deadlines.weights_s`.

        Returns:
            The workers' metrics, and whether the learner's GPUs sent the weights; None where they cannot.
        """
        self.policy = weights
        sent = None if self._sender is None else self._send(self._sender)
        self.workers, metrics = self._load(self.workers, weights, received=bool(sent))
        return metrics, sent

    def _send(self, sender: PolicySender) -> bool:
        """Whether the learner's GPUs have sent what it published into every engine."""
        self.workers = [self._started(worker) for worker in self.workers]
        try:
            sender.send({worker.name: worker.actor for worker in self.workers})
        except TransferFailed as error:
            logger.warning("%s", error)
            return False
        return True

    def _load(
        self, workers: Sequence[WorkerHandle], weights: PolicyWeights, *, received: bool = False
    ) -> tuple[list[WorkerHandle], list[Metrics]]:
        """Loads all workers at once, or passes them through the gate if they have received the weights already.

        Returns them, with the dead and hanging replaced, and their metrics, in order.
        """
        doing, tolerance = _loading(weights), self._engine.gate_tolerance
        replies = []
        for worker in workers:
            load = worker.actor.accept_weights if received else worker.actor.load_weights
            replies.append((worker, load.remote(weights, tolerance)))
        loaded, metrics = [], []
        for worker, reply in replies:
            while True:
                started = self._started(worker)
                if started is worker:
                    try:
                        metrics.append(self.answer(worker, reply, doing, self._deadlines.weights_s))
                        break
                    except WORKER_ERRORS as error:
                        # A worker that hangs may do so in a chunk that another worker has answered meanwhile.
                        started = self._replacement(worker, "load_weights", error)
                worker, reply = started, started.actor.load_weights.remote(weights, tolerance)
            loaded.append(worker)
        return loaded, metrics

    # ------------------------------------------------------------------ one worker

    def answer(self, worker: WorkerHandle, reply: Any, doing: str, deadline_s: float) -> Any:
        """Waits for the answer to a call.

        Args:
            doing: the call, as an error shall name it.

        Raises:
            DeadlineExceeded: the answer did not come in time.
            PipelineError: the worker's own.
            ACTOR_DIED, RayTaskError: the worker is gone, or its code failed.
        """
        try:
            return ray.get(reply, timeout=deadline_s)
        except GetTimeoutError as error:
            raise self.deadline_exceeded(worker, doing, deadline_s) from error
        except RayTaskError as error:
            if isinstance(error.cause, PipelineError):
                raise error.cause from error
            raise

    def recover(
        self, worker: WorkerHandle, call: WorkerCall, error: Exception, *, is_awaited: bool = True
    ) -> WorkerHandle | None:
        """Does what `decide_on_failure` says about a failed call to a worker that was sampling.

        Waits, where the worker is replaced, until its successor holds the policy.

        Args:
            is_awaited: whether anybody still waits for what was sampled.

        Returns:
            The successor, in the same place; None where the fleet goes on without one.

        Raises:
            WorkerDied, DeadlineExceeded, or the worker's own error: it is not replaced, or not any more.
        """
        serves = worker in self.workers and self.policy is not None
        standing: Standing = "serving" if serves else "left"
        failure = self._failure(worker, call, error, standing=standing, is_awaited=is_awaited)
        successor = self._carry_out(worker, failure)
        if successor is None or self.policy is None:
            return None
        place = self.workers.index(worker)
        # In its place before it loads: `end` ends whom it finds there.
        self.workers[place] = successor
        [self.workers[place]], _ = self._load([successor], self.policy)
        return self.workers[place]

    def deadline_exceeded(self, worker: WorkerHandle, doing: str, deadline_s: float) -> DeadlineExceeded:
        """The error for a call that did not return; tells what the cluster has free."""
        return deadline_exceeded(worker.name, doing, deadline_s, self._config, ray.available_resources())

    def _started(self, worker: WorkerHandle) -> WorkerHandle:
        """The worker once its engine has started, or the one that had to replace it."""
        while True:
            try:
                self.answer(worker, worker.started, "start()", self._deadlines.start_s)
            except WORKER_ERRORS as error:
                worker = self._replacement(worker, "start", error)
            else:
                return worker

    def _replacement(self, worker: WorkerHandle, call: WorkerCall, error: Exception) -> WorkerHandle:
        """A new worker for one that the fleet cannot go on without; or the error."""
        failure = self._failure(worker, call, error)
        successor = self._carry_out(worker, failure)
        if successor is None:
            raise failure.error
        return successor

    def _failure(
        self,
        worker: WorkerHandle,
        call: WorkerCall,
        error: Exception,
        *,
        standing: Standing = "serving",
        is_awaited: bool = True,
    ) -> WorkerFailure:
        """What Ray or the worker raised, as `decide_on_failure` takes it."""
        if isinstance(error, ACTOR_DIED):
            doing = _loading(self.policy) if call == "load_weights" and self.policy is not None else f"{call}()"
            died = worker_died(worker.name, doing, self._config)
            died.__cause__ = error
            return WorkerFailure(call=call, kind="died", error=died, standing=standing)
        kind: FailureKind = "hangs" if isinstance(error, DeadlineExceeded) else "failed"
        return WorkerFailure(call=call, kind=kind, error=error, standing=standing, is_awaited=is_awaited)

    def _carry_out(self, worker: WorkerHandle, failure: WorkerFailure) -> WorkerHandle | None:
        """Does what `decide_on_failure` says. Returns a replacement, which still starts, or None."""
        decision = decide_on_failure(failure, restarts_left=self._restarts_left)
        if decision.ends_worker:
            worker.end()
        if decision.action == "raise":
            raise decision.error
        if decision.action == "drop":
            return None
        self._restarts_left -= 1
        logger.warning("%s Replacing it, %d restarts left.", decision.error, self._restarts_left)
        return self._start_worker(worker.bundle)

    def _start_workers(self, count: int) -> list[WorkerHandle]:
        """Starts so many workers, or as many as there are free bundles."""
        placement = self._actors.placement
        if placement is None:
            return [self._start_worker(None) for _ in range(count)]
        taken = {worker.bundle for worker in (*self.workers, *self.joining)}
        free = [bundle for bundle in range(placement.num_bundles) if bundle not in taken]
        return [self._start_worker(bundle) for bundle in free[: max(0, count)]]

    def _start_worker(self, bundle: int | None) -> WorkerHandle:
        name = f"rollout worker {self._num_started}"
        self._num_started += 1
        return start_worker(name, bundle, self._engine, self._config, self._actors)


def _loading(weights: PolicyWeights) -> str:
    return f"load_weights() of policy version {weights.version}"
