"""Samples one batch after another on the workers of a fleet, in a thread of its own, while new weights come between."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ray
from ray.exceptions import RayTaskError

from actors.ray_errors import ACTOR_DIED
from actors.rollout_fleet import SLICE_S, RolloutFleet
from actors.worker_handle import WorkerHandle
from cluster.autoscaler import RolloutWaits
from pipeline.errors import DeadlineExceeded, PipelineError, StaleEngineError
from pipeline.records import Prompt, Rollout, SamplingParams
from pipeline.rollouts.chunks import Chunk, ChunkLedger
from pipeline.rollouts.requests import rollout_requests

CHUNKS_PER_WORKER = 2
"""The least number: while a worker's answer travels, the worker samples another chunk."""

PausePoint = Literal["chunks", "tokens"]
"""Where the engines stop: before the next chunk begins, or before the next token of a chunk."""


@dataclass(kw_only=True, eq=False)
class SamplingBatch:
    """A batch between `begin` and `collect`, in the hands of the sampling thread."""

    ledger: ChunkLedger
    sampling: SamplingParams
    resample_unfinished: bool
    reserved: dict[str, deque[Chunk]] = field(default_factory=dict)
    """Name of a worker -> the chunks that it may begin beside the one it was called for, in this order."""
    begun_at: float = field(default_factory=time.monotonic)
    finished_at: float = 0.0
    is_abandoned: bool = False

    @property
    def is_over(self) -> bool:
        return self.is_abandoned or self.ledger.is_complete

    def release_reserved(self) -> None:
        """Lets every chunk wait again that no worker was called for."""
        for name in [*self.reserved]:
            self.release_reserved_by(name)

    def release_reserved_by(self, worker: str) -> None:
        """As `release_reserved`, for the chunks of one worker; the first of them is the next to be issued."""
        for chunk in reversed(self.reserved.pop(worker, deque())):
            self.ledger.release(chunk)

    def issue_to(self, worker: str, now: float) -> Chunk | None:
        """The next chunk for a worker to sample: the first that it has reserved and nobody has answered, or another."""
        reserved = self.reserved.get(worker, deque())
        while reserved:
            chunk = self.ledger.issue_reserved(now, reserved.popleft())
            if chunk is not None:
                return chunk
        return self.ledger.issue(now)

    def reserve_behind(self, running: dict[str, Chunk], now: float, num_workers: int) -> dict[str, Chunk]:
        """Name of a worker -> one more chunk that it may begin, for workers of which these chunks are the last.

        Args:
            running: name of a worker -> the chunk that it was called for.
        """
        last = {name: (self.reserved.get(name) or [chunk])[-1] for name, chunk in running.items()}
        behind = self.ledger.reserve(now, [*last.values()], num_workers)
        more = {name: behind[chunk] for name, chunk in last.items() if chunk in behind}
        for name, chunk in more.items():
            self.reserved.setdefault(name, deque()).append(chunk)
        return more


@dataclass(frozen=True, kw_only=True)
class ChunkCall:
    """A worker's work on one chunk, from `sample` over any number of `continue_sampling` to its answer."""

    worker: WorkerHandle
    batch: SamplingBatch
    chunk: Chunk
    issued_at: float
    allowed_s: float

    @property
    def deadline(self) -> float:
        return self.issued_at + self.allowed_s


class BatchSampler:
    """Hands the chunks of a batch to whichever worker is free, and puts the answers in order.

    Two threads use the fleet in turns. The sampling thread hands out chunks and takes answers. The caller's thread
    holds the sampling thread back (`paused`) while it changes workers or weights. What always holds under `turn`:

    - A worker has at most one call in `calls`, and a chunk that is out is in `calls` or among the paused calls.
    - No chunk is begun while the caller's thread waits or works. Before a pause between chunks, workers finish their
      chunks, and backup tasks of late chunks help. Before a pause between tokens, calls come back after at most a
      slice, and are kept as paused calls.
    - Paused calls continue as soon as the sampling thread may hand out again. No chunk has two paused calls: they would
      continue it with different samples.
    - A reserved chunk is with a worker that serves. It waits again when its worker is gone, and before a pause after
      which it must begin anew or with another worker.
    """

    def __init__(self, fleet: RolloutFleet, *, chunk_size: int, generate_s: float, weights_s: float) -> None:
        """Starts no thread before the first `begin`.

        Args:
            chunk_size: requests handed to a worker at a time, at most.
            generate_s: how long a worker may take for a chunk before it counts as hanging.
            weights_s: how long it may take once new weights wait for the worker.
        """
        self._fleet = fleet
        self._chunk_size = chunk_size
        self._generate_s = generate_s
        self._weights_s = weights_s

        # Protects the attributes below, the current batch and its ledger, and which workers the fleet has. Either
        # thread holds it while it uses the workers, also while it loads weights or replaces a worker; the sampling
        # thread lets go of it while it waits for an answer.
        # The sampling thread waits on it while it may not hand out and no call is out; `paused` notifies at its end.
        # The caller's thread waits on it in `paused` until no engine decodes for the batch; the sampling thread
        # notifies after every look at the answers, and when it fails.
        self.turn = threading.Condition()
        self.calls: dict[Any, ChunkCall] = {}
        """Reference to an answer -> its call. Calls of an abandoned batch stay here until they come back."""
        self._pause_point: PausePoint | None = None
        """Where the sampling thread is held back; None where it may hand out."""
        self._paused_calls: list[ChunkCall] = []
        """Calls of workers that stand between two tokens. They go on once the new weights have come."""
        self._counts = Counter[str]()
        self._response_tokens: dict[str, float] = {}
        """Id of a prompt -> the length of its last response, which predicts what a chunk will take."""

        # Set by the caller's thread alone, so without `turn`.
        self._batch: tuple[SamplingBatch, Future[None]] | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")

    # ------------------------------------------------------------------ the caller's thread

    def begin(self, prompts: Sequence[Prompt], sampling: SamplingParams, *, resample_unfinished: bool) -> None:
        """Starts to sample a batch and returns at once; a batch begun before and not collected is abandoned.

        Args:
            resample_unfinished: as `RolloutPool.begin`.
        """
        self.abandon()
        # A copy, for the thread may still take an answer of the batch before. A new prompt counts as an average one.
        known = dict(self._response_tokens)
        average = sum(known.values()) / max(1, len(known))
        requests = rollout_requests(prompts, sampling)
        share = math.ceil(len(requests) / (CHUNKS_PER_WORKER * len(self._fleet.workers)))
        ledger = ChunkLedger(
            requests,
            min(self._chunk_size, share),
            lambda request: known.get(request.prompt.id, average),
        )
        batch = SamplingBatch(ledger=ledger, sampling=sampling, resample_unfinished=resample_unfinished)
        self._batch = batch, self._executor.submit(self._sample, batch)

    def collect(self) -> tuple[list[Rollout], RolloutWaits]:
        """Consumes the batch that was begun: its rollouts in the order of the requests, and who waited for whom.

        Waits for the sampling thread to finish the batch. Unblocked by the last answer, and by the thread's error,
        which it raises.
        """
        if self._batch is None:
            raise StaleEngineError("no batch was begun: call begin before collect.")
        called_at = time.monotonic()
        batch, sampled = self._batch
        sampled.result()
        self._batch = None
        waits = RolloutWaits(
            rollout_s=batch.finished_at - batch.begun_at,
            learner_wait_s=max(0.0, batch.finished_at - called_at),
            queue_wait_s=max(0.0, called_at - batch.finished_at),
        )
        return batch.ledger.rollouts(), waits

    def abandon(self) -> None:
        """Drops the batch: no more of its chunks are handed out, and answers to those that are out are dropped.

        Does not wait: the sampling thread leaves the batch after at most a slice.
        """
        if self._batch is not None:
            self._batch[0].is_abandoned = True
            self._batch = None

    @contextmanager
    def paused(self, *, between: PausePoint) -> Iterator[None]:
        """Inside, the caller has the workers to itself: none decodes for the batch, and nothing is handed out.

        Between "chunks", none has begun a chunk that it did not finish; between "tokens", all stand between two tokens
        of one. At the end the batch goes on where it stopped, or what had begun begins anew if the batch wants that.

        Waits until the engines have stopped. Unblocked by their answers, by the deadline of a worker that hangs and is
        replaced, and by a sampling thread that fails. `collect` raises the error of the sampling thread.
        """
        with self.turn:
            self._pause_point = between
            try:
                if self._batch is not None:
                    batch, _ = self._batch
                    if between == "chunks" or batch.resample_unfinished:
                        batch.release_reserved()
                    if between == "tokens":
                        self._expect_slices()
                    self.turn.wait_for(lambda: batch.is_over or not self._is_decoding(batch, between))
                    batch.ledger.interrupt()
                yield
            finally:
                self._pause_point = None
                self.turn.notify_all()

    def take_counts(self) -> Counter[str]:
        """Consumes what was counted since the last time: chunks "issued again", and answers "dropped"."""
        counts, self._counts = self._counts, Counter()
        return counts

    def close(self) -> None:
        """Waits for the sampling thread; unblocked by `abandon`, and by the end of the workers it waits for."""
        self._executor.shutdown()

    def _expect_slices(self) -> None:
        """Brings the deadlines forward: the learner waits now, so a worker that does not pause soon hangs."""
        now = time.monotonic()
        for reply, call in self.calls.items():
            allowed_s = min(call.allowed_s, now + self._weights_s - call.issued_at)
            self.calls[reply] = replace(call, allowed_s=allowed_s)

    def _is_decoding(self, batch: SamplingBatch, between: PausePoint) -> bool:
        if between == "chunks":
            return batch.ledger.is_out
        return any(self._is_awaited(batch, call) for call in self.calls.values())

    # ------------------------------------------------------------------ the sampling thread

    def _sample(self, batch: SamplingBatch) -> None:
        """Hands out the chunks of a batch and takes the answers until it is complete, or nobody wants it."""
        try:
            while not batch.is_over:
                with self.turn:
                    self.turn.wait_for(self._may_look)
                    wake_at = self._hand_out(batch)
                    if not self.calls:
                        continue
                # New weights bring deadlines forward: no wait is longer than a slice.
                timeout_s = min(wake_at - time.monotonic(), SLICE_S)
                ready, _ = ray.wait(list(self.calls), num_returns=1, timeout=max(0.0, timeout_s))
                with self.turn:
                    if not batch.is_abandoned:
                        now = time.monotonic()
                        self._take_answers(batch, ready, now)
                        self._replace_hanging(now)
                    self.turn.notify_all()
            batch.finished_at = time.monotonic()
        except BaseException:
            with self.turn:
                batch.is_abandoned = True
                self.turn.notify_all()
            raise

    def _may_look(self) -> bool:
        """Whether there is anything to do: chunks to hand out, answers to wait for, or paused calls to finish."""
        if self._pause_point is None or self.calls:
            return True
        return self._pause_point == "chunks" and bool(self._paused_calls)

    def _hand_out(self, batch: SamplingBatch) -> float:
        """A chunk for every worker without one, while there are chunks. Returns when to look again at the latest."""
        now = time.monotonic()
        if self._pause_point == "tokens":
            return min(call.deadline for call in self.calls.values())
        while self._paused_calls:
            call = self._paused_calls.pop(0)
            self._continue(batch, replace(call, issued_at=now, allowed_s=self._generate_s))
        for name in batch.reserved.keys() - {worker.name for worker in self._fleet.workers}:
            batch.release_reserved_by(name)
        busy = {call.worker.name for call in self.calls.values()}
        idle = [worker for worker in self._fleet.workers if worker.name not in busy]
        handed = self._chunks_for(batch, idle, now)
        if not self._pause_point:
            # For all of them at once: of two workers, one that decodes more responses at a time ends later.
            alone = {worker.name: chunk for worker, chunk in handed.items() if not batch.reserved.get(worker.name)}
            batch.reserve_behind(alone, now, len(self._fleet.workers))
        for worker, chunk in handed.items():
            self._call(batch, worker, chunk, now)
        next_deadline = min((call.deadline for call in self.calls.values()), default=math.inf)
        return min(next_deadline, batch.ledger.next_late_at()) if len(handed) < len(idle) else next_deadline

    def _chunks_for(self, batch: SamplingBatch, idle: Sequence[WorkerHandle], now: float) -> dict[WorkerHandle, Chunk]:
        """New chunks, unless the thread is held back; then backup tasks for workers that would have nothing to do."""
        handed = {}
        for worker in idle:
            chunk = None if self._pause_point else batch.issue_to(worker.name, now)
            if chunk is None:
                chunk = batch.ledger.issue_again(now)
                self._counts["issued again"] += chunk is not None
            if chunk is not None:
                handed[worker] = chunk
        return handed

    def _call(self, batch: SamplingBatch, worker: WorkerHandle, chunk: Chunk, now: float) -> None:
        """Asks a worker for a chunk, and tells it which ones it may begin beside."""
        reply = worker.actor.sample.remote(
            chunk.requests,
            batch.sampling,
            [request for reserved in batch.reserved.get(worker.name, ()) for request in reserved.requests],
            seconds=SLICE_S,
            resample_unfinished=batch.resample_unfinished,
        )
        self.calls[reply] = ChunkCall(
            worker=worker, batch=batch, chunk=chunk, issued_at=now, allowed_s=self._generate_s
        )

    def _continue(self, batch: SamplingBatch, call: ChunkCall, *, num_open: float = math.inf) -> None:
        """Lets a worker decode on, if it is still there and somebody waits for its chunk.

        Args:
            num_open: the requests without a response in its engine. With a chunk or less it gets another one: no
                engine runs empty for the longest response of a chunk.
        """
        worker = call.worker
        if worker not in self._fleet.workers or not self._is_wanted(batch, call):
            self._put_back(call)
            return
        more = {}
        if self._pause_point is None and num_open <= self._chunk_size:
            more = batch.reserve_behind({worker.name: call.chunk}, time.monotonic(), len(self._fleet.workers))
        ahead = [request for chunk in more.values() for request in chunk.requests]
        self.calls[worker.actor.continue_sampling.remote(ahead, seconds=SLICE_S)] = call

    def _is_wanted(self, batch: SamplingBatch, call: ChunkCall) -> bool:
        """Whether the call's chunk has no answer yet, and none that new weights would outdate."""
        is_outdated = self._pause_point is not None and batch.resample_unfinished
        return self._is_awaited(batch, call) and not is_outdated

    def _is_awaited(self, batch: SamplingBatch, call: ChunkCall) -> bool:
        return call.batch is batch and batch.ledger.wants(call.chunk)

    def _take_answers(self, batch: SamplingBatch, ready: Sequence[Any], now: float) -> None:
        """Takes what the finished calls bring: rollouts, what a worker still has to decode, or a failure."""
        for reply in ready:
            call = self.calls.pop(reply)
            try:
                answer = self._fleet.answer(call.worker, reply, "sample()", self._generate_s)
            except (*ACTOR_DIED, DeadlineExceeded) as error:
                self._put_back(call)
                self._fleet.recover(call.worker, "sample", error)
                continue
            except (RayTaskError, PipelineError) as error:
                # Raises it, unless nobody waits for that batch any more, and so for its errors.
                self._fleet.recover(call.worker, "sample", error, is_awaited=call.batch is batch)
                self._counts["dropped"] += 1
                continue
            if not self._is_wanted(batch, call):
                self._put_back(call)
                self._counts["dropped"] += 1
            elif not isinstance(answer, int):
                batch.ledger.accept(call.chunk, answer, now)
                self._response_tokens |= {r.prompt.id: float(len(r.response_ids)) for r in answer}
            elif self._pause_point == "tokens":
                self._keep_paused(call)
            else:
                self._continue(batch, call, num_open=answer)

    def _keep_paused(self, call: ChunkCall) -> None:
        # Two copies would go on as different samples, of which the first is the one with shorter responses.
        if any(other.chunk is call.chunk for other in self._paused_calls):
            self._counts["dropped"] += 1
        else:
            self._paused_calls.append(call)

    def _replace_hanging(self, now: float) -> None:
        """Gives up the calls that are past their deadline; their workers hang."""
        late = [reply for reply, call in self.calls.items() if call.deadline <= now]
        # An answer that is there came in time: that of an abandoned batch lies unread until its turn comes.
        answered, _ = ray.wait(late, num_returns=len(late), timeout=0) if late else ([], [])
        for reply in set(late) - set(answered):
            call = self.calls.pop(reply)
            self._put_back(call)
            error = self._fleet.deadline_exceeded(call.worker, "sample()", round(call.allowed_s, 1))
            self._fleet.recover(call.worker, "sample", error)

    def _put_back(self, call: ChunkCall) -> None:
        if not any(other.chunk is call.chunk for other in (*self.calls.values(), *self._paused_calls)):
            call.batch.ledger.put_back(call.chunk)
