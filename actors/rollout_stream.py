"""Samples responses as they are asked for: every engine's queue stays full, and answers come as they finish."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from itertools import count
from typing import Any

import ray

from actors.rollout_fleet import SLICE_S, WORKER_ERRORS, RolloutFleet
from actors.worker_handle import WorkerHandle
from pipeline.records import Prompt, Rollout, SamplingParams
from pipeline.rollouts.requests import require_room, rollout_requests

PromptToSample = tuple[Prompt, SamplingParams]


class StreamSampler:
    """One stream of rollouts, from its first prompt until none waits and every engine is empty.

    It runs in the caller's thread, between the rollouts that the caller reads. No batch may be sampled meanwhile.
    """

    def __init__(self, fleet: RolloutFleet, *, max_model_len: int, max_sequences: int, generate_s: float) -> None:
        """
        Args:
            max_model_len: tokens of prompt and response together.
            max_sequences: how many responses an engine decodes at once.
            generate_s: how long a worker may take for a slice before it counts as hanging.
        """
        self._fleet = fleet
        self._max_model_len = max_model_len
        self._max_sequences = max_sequences
        self._generate_s = generate_s
        self._numbers = count()
        self._submitted: dict[str, dict[int, PromptToSample]] = {worker.name: {} for worker in fleet.workers}
        """Name of a worker -> number of a request -> the prompt in the worker's engine."""
        self._running: dict[Any, tuple[WorkerHandle, float]] = {}
        """Ray's reference to the answer -> the worker and the time of the call; at most one call a worker."""

    def rollouts(self, waiting: deque[PromptToSample]) -> Iterator[Rollout]:
        """One rollout for each prompt that waits, as it finishes.

        Consumes `waiting` from the left. Waits for the next worker that has decoded for a slice; unblocked by its
        answer, its death, and the deadline.
        """
        while True:
            busy = {worker.name for worker, _ in self._running.values()}
            for worker in self._fleet.workers:
                if worker.name not in busy:
                    self._advance(worker, waiting)
            if not self._running:
                return
            yield from self._next_finished(waiting)

    def _advance(self, worker: WorkerHandle, waiting: deque[PromptToSample]) -> None:
        """Gives the worker its share of what is open, and lets it decode."""
        mine = self._submitted[worker.name]
        num_open = sum(map(len, self._submitted.values())) + len(waiting)
        share = math.ceil(num_open / len(self._submitted))
        # As many wait in the engine as it decodes: more than finish during a call.
        room = min(share, 2 * self._max_sequences) - len(mine)
        requests = {}
        for _ in range(min(room, len(waiting))):
            prompt, sampling = waiting.popleft()
            require_room([prompt], sampling, self._max_model_len)
            [request] = rollout_requests([prompt], sampling)
            number = next(self._numbers)
            requests[number], mine[number] = (request, sampling), (prompt, sampling)
        if mine:
            self._running[worker.actor.advance.remote(requests, SLICE_S)] = (worker, time.monotonic())

    def _next_finished(self, waiting: deque[PromptToSample]) -> list[Rollout]:
        """What the next worker to answer has finished. What a dead worker had waits again, before all others."""
        reply, worker = self._next_to_answer()
        try:
            if reply is None:
                raise self._fleet.deadline_exceeded(worker, "advance()", self._generate_s)
            finished = self._fleet.answer(worker, reply, "advance()", self._generate_s)
        except WORKER_ERRORS as error:
            successor = self._fleet.recover(worker, "advance", error)
            waiting.extendleft(reversed(self._submitted.pop(worker.name).values()))
            if successor is not None:
                self._submitted[successor.name] = {}
            return []
        for number in finished:
            del self._submitted[worker.name][number]
        # Before the rollouts are read: the engine decodes meanwhile.
        self._advance(worker, waiting)
        return list(finished.values())

    def _next_to_answer(self) -> tuple[Any | None, WorkerHandle]:
        """The next call to come back and its worker; no call, and the worker that hangs, past its deadline."""
        late_reply = min(self._running, key=lambda reply: self._running[reply][1])
        worker, issued_at = self._running[late_reply]
        left = self._generate_s - (time.monotonic() - issued_at)
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=max(0.0, left))
        if not ready:
            del self._running[late_reply]
            return None, worker
        return ready[0], self._running.pop(ready[0])[0]
