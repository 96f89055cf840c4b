"""The pool of rollout workers: hands out requests, replaces workers, resizes. Implements `BackgroundRolloutSource`."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from types import TracebackType
from typing import Any, Literal, Protocol

import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from actors.ray_errors import ACTOR_DIED as DIED
from actors.rollout_worker import RolloutWorker
from cluster.autoscaler import Autoscaler, RolloutWaits
from cluster.engine_build import resolve_rollout
from cluster.placement import Placement
from cluster.rollout_plan import THROUGH_FILES, RolloutPlan
from cluster.running_jobs import actor_name
from pipeline.config.cluster import DeadlinesConfig, RolloutConfig
from pipeline.errors import (
    ConfigError,
    DeadlineExceeded,
    PipelineError,
    StaleEngineError,
    TransferFailed,
    WorkerDied,
    WorkerError,
)
from pipeline.records import Metrics, PolicyWeights, Prompt, Rollout, SamplingParams
from pipeline.rollouts.chunks import Chunk, ChunkLedger
from pipeline.rollouts.requests import require_room, rollout_requests

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Worker:
    """The driver's hold on one rollout worker."""

    name: str
    actor: Any
    started: Any
    """Reference that resolves when the engine is up, or raises why it is not."""
    bundle: int | None = None
    """Of the placement that the worker shares with a rank of the learner."""
    asked: float = field(default_factory=time.monotonic)
    """When."""


class WeightSender(Protocol):
    """The learner's ranks, as far as they can send their weights without a file."""

    def send(self, workers: Mapping[str, Any]) -> None:
        """Sends the published policy into the engines of these idle workers, name -> Ray handle.

        Raises TransferFailed when any of them did not take it.
        """


CHUNKS_A_WORKER = 2
"""At least: one to answer and one to go on with."""
SLICE_S = 0.5
"""How long an engine decodes before it can be told something else: new requests, new weights, or to go on."""

Asked = tuple[Prompt, SamplingParams]
Between = Literal["chunks", "tokens"]


@dataclass(kw_only=True, eq=False)
class Batch:
    """A batch between `begin` and `collect`, in the hands of the sampling thread."""

    ledger: ChunkLedger
    sampling: SamplingParams
    resample_unfinished: bool
    ahead: dict[str, Chunk] = field(default_factory=dict)
    """By a worker's name, what it has begun beside the chunk that it was called for."""
    begun: float = field(default_factory=time.monotonic)
    finished: float = 0.0
    abandoned: bool = False

    @property
    def is_over(self) -> bool:
        return self.abandoned or self.ledger.is_complete

    def give_up_ahead(self) -> None:
        """Lets everything wait again that no worker was called for."""
        while self.ahead:
            self.ledger.release(self.ahead.popitem()[1])


@dataclass(frozen=True, kw_only=True)
class Call:
    """One chunk with one worker."""

    worker: Worker
    batch: Batch
    chunk: Chunk
    asked: float
    """When."""
    allowed_s: float

    @property
    def deadline(self) -> float:
        return self.asked + self.allowed_s


class RolloutPool:
    """n engines behind one port. How many there are, and which one answers a request, changes nothing but the speed.

    Seeds belong to requests, not to workers. That suffices where an engine's logits do not depend on what shares a
    batch: float32 on CPU gave 170,000 tokens and their logprobs bit for bit, however they were chunked. GPU kernels may
    choose by batch size; then a token drawn within a rounding error of a boundary can come out differently.

    Two threads use the workers, in turns: one samples the batch that was begun, the caller's loads weights. A load
    interrupts the engines between two tokens. Responses that were begun go on with the new weights, or begin anew.
    """

    def __init__(
        self,
        model_uri: str,
        config: RolloutConfig,
        deadlines: DeadlinesConfig,
        *,
        dtype: str,
        max_model_len: int,
        gate_tolerance: float,
        seed: int,
        plan: RolloutPlan = THROUGH_FILES,
        placement: Placement | None = None,
        worker: type = RolloutWorker,
        workspace: str | None = None,
        requested_workers: Callable[[], int | None] = lambda: None,
        autoscaler: Autoscaler | None = None,
    ) -> None:
        """Starts the workers and returns at once; the first `load_weights` waits for them.

        Args:
            model_uri: config and tokenizer files; weights there are not read. Every node must reach it.
            max_model_len: tokens of prompt and response together.
            gate_tolerance: largest mean absolute logprob difference to the learner, nats.
            plan: what the engines can do beside reading a published file (`fed_by`), and whether they `sleep`.
            placement: bundles that the workers share with the learner, one each; None asks the cluster for room.
            worker: what runs in each Ray actor.
            workspace: of the job, told by the actors' names (`cluster/running_jobs.py`); None leaves them nameless.
            requested_workers: asked between batches; the pool grows or shrinks to what it says, None changes nothing.
            autoscaler: asked where `requested_workers` says None.
        """
        self._worker_class = worker
        self._workspace = workspace
        self._config = resolve_rollout(config)
        self._start_arguments = (model_uri, self._config, plan, dtype, max_model_len, seed)
        self._plan = plan
        self._placement = placement
        self._sender: WeightSender | None = None
        self._max_model_len = max_model_len
        self._deadlines = deadlines
        self._tolerance = gate_tolerance
        self._weights: PolicyWeights | None = None
        self._restarts_left = config.max_restarts
        self._num_started = 0
        self._workers: list[Worker] = []
        self._requested_workers = requested_workers
        self._autoscaler = autoscaler
        self._waits: RolloutWaits | None = None
        self._joining: list[Worker] = []
        self._given_up: float | None = None
        self._turn = threading.Condition()
        self._calls: dict[Any, Call] = {}
        self._held_back: Between | None = None
        """Where the sampling thread stops."""
        self._paused: list[Call] = []
        """Of workers that were not told to go on, for new weights come first."""
        self._sampler = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")
        self._batch: tuple[Batch, Future[None]] | None = None
        self._response_tokens: dict[str, float] = {}
        self._counts = Counter[str]()
        self.resize(config.workers)

    @property
    def num_workers(self) -> int:
        return len(self._workers)

    @property
    def _most_workers(self) -> float:
        return math.inf if self._placement is None else self._placement.num_bundles

    def resize(self, num_workers: int) -> None:
        """Grows or shrinks the pool between chunks. A joining worker loads the current weights and passes the gate."""
        if num_workers < 1:
            raise ConfigError(f"a rollout pool of {num_workers} workers cannot sample; ask for at least 1.")
        if num_workers > self._most_workers:
            raise ConfigError(
                f"{num_workers} rollout workers do not fit the learner's {self._most_workers} GPUs, which hold one "
                f"each. Ask for {self._most_workers}, or set cluster.rollout.placement=disaggregated."
            )
        with self._between("chunks"):
            while len(self._workers) > num_workers:
                _end(self._workers.pop())
            joining = self._start_workers(num_workers - len(self._workers))
            if joining and self._weights is not None:
                joining, _ = self._load(joining, self._weights)
            self._workers += joining

    def _wanted_workers(self) -> float | None:
        """As an operator or the autoscaler asks for, and as there is room."""
        wanted = self._requested_workers()
        if wanted is None and self._autoscaler is not None:
            wanted = self._autoscaler.wanted(len(self._workers), self._waits)
        return None if wanted is None else min(wanted, self._most_workers)

    def _follow(self, wanted: float | None) -> list[Worker]:
        """Shrinks at once; grows without waiting: a worker that starts while others sample joins at the next update.

        Returns those that join at this one, and those that have had no place to start for too long.
        """
        if wanted is None:
            return []
        while self._joining and len(self._workers) + len(self._joining) > wanted:
            _end(self._joining.pop())
        while len(self._workers) > wanted:
            _end(self._workers.pop())
        if wanted != self._given_up:
            self._joining += self._start_workers(wanted - len(self._workers) - len(self._joining))
        overdue = time.monotonic() - self._deadlines.start_s
        return [worker for worker in self._joining if worker.asked < overdue or _has_started(worker)]

    def _join(self, joining: Sequence[Worker], weights: PolicyWeights, wanted: float | None) -> list[Metrics]:
        """Takes in those that load the published policy and pass the gate."""
        call = _loading(weights)
        calls = [(worker, worker.actor.load_weights.remote(weights, self._tolerance)) for worker in joining]
        metrics = []
        for worker, reference in calls:
            try:
                if not _has_started(worker):
                    raise self._deadline_exceeded(worker, "start()", self._deadlines.start_s)
                self._answer(worker, worker.started, "start()", self._deadlines.start_s)
                metrics.append(self._answer(worker, reference, call, self._deadlines.weights_s))
            except (*DIED, RayTaskError, PipelineError) as error:
                # The run goes on with the workers it has: a request from outside must not end it.
                self._given_up = wanted
                logger.warning("%s, asked for from outside, did not join: %s", worker.name, error)
                _end(worker)
            else:
                self._workers.append(worker)
            self._joining.remove(worker)
        return metrics

    @contextmanager
    def fed_by(self, sender: WeightSender) -> Iterator[None]:
        """Within it, engines that can take weights from the learner's GPUs do; what is published is what it sends.

        Who joins later or replaces a dead worker reads the published file, and so do all when a transfer fails.
        """
        self._sender = None if self._plan.weight_transfer == "shm" else sender
        try:
            yield
        finally:
            self._sender = None

    def sleep(self) -> None:
        """Engines that share the learner's GPUs leave them to it until the next `load_weights`; others stay awake.

        Between batches only. A worker that does not fall asleep is ended, and replaced when weights are loaded.
        """
        if self._plan.placement == "disaggregated":
            return
        with self._between("chunks"):
            self._workers = [self._up(worker) for worker in self._workers]
            calls = [(worker, worker.actor.sleep.remote()) for worker in (*self._workers, *self._joining)]
            for worker, asleep in calls:
                try:
                    # One that joins has to start first.
                    self._answer(worker, asleep, "sleep()", self._deadlines.start_s)
                except (*DIED, RayTaskError, DeadlineExceeded) as error:
                    logger.warning("%s is ended: it did not leave its GPU to the learner. %s", worker.name, error)
                    _end(worker)

    def load_weights(self, weights: PolicyWeights) -> Metrics:
        """Gives every engine the published policy; the slowest engine and the widest gap make the metrics.

        Responses in the making are interrupted. As `begin` was told, the new policy goes on with them or they begin
        anew; only where the pool is to shrink, the chunks that are out and shall not begin anew are finished first.

        Returns:
            `gate/*`, `weights/*`, `memory/*` of the worker that needed most, and `rollout/*`: workers; chunks issued
            again because they were late, and answers dropped, since the last load; and of a batch that was sampled
            while the learner worked, its seconds and who waited for whom.

        Raises:
            StaleEngineError: an engine does not reproduce the learner's probe log-probabilities.
            WorkerDied, DeadlineExceeded: a worker is gone or does not answer, and the retry budget is spent.
        """
        if weights.node is None:
            weights = replace(weights, node=ray.get_runtime_context().get_node_id())
        wanted = self._wanted_workers()
        shrinks = wanted is not None and wanted < len(self._workers)
        with self._between("chunks" if shrinks else "tokens"):
            joining = self._follow(wanted)
            self._weights = weights
            sent = self._sender is not None and self._send(self._sender)
            self._workers, metrics = self._load(self._workers, weights, received=sent)
            metrics += self._join(joining, weights, wanted)
            counts, self._counts = self._counts, Counter()
            waits, self._waits = self._waits, None
        overlap = (
            {
                "rollout/seconds": waits.rollout_s,
                "rollout/learner_wait_s": waits.learner_wait_s,
                "rollout/queue_wait_s": waits.queue_wait_s,
            }
            if waits is not None
            else {}
        )
        if self._sender is not None:
            overlap["weights/sent_between_gpus"] = float(sent)
        return overlap | {
            "rollout/workers": float(len(self._workers)),
            "rollout/chunks_issued_again": float(counts["issued again"]),
            "rollout/answers_dropped": float(counts["dropped"]),
            "gate/mean": max(m["gate/mean"] for m in metrics),
            "gate/max": max(m["gate/max"] for m in metrics),
            "weights/written_gb_per_s": weights.written_gb_per_s,
            "weights/seconds": max(m["weights/seconds"] for m in metrics),
            "weights/gb_per_s": min(m["weights/gb_per_s"] for m in metrics),
            "weights/copy_gb_per_s": min(m["weights/copy_gb_per_s"] for m in metrics),
            "memory/rollout_worker_peak_gib": max(m["memory/rollout_worker_peak_gib"] for m in metrics),
        }

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Samples in chunks, handed to whichever worker is free, which begins with another before it is done; a worker
        that dies or hangs is replaced and its chunks issued again.

        Raises:
            DataError: a prompt leaves no room for the longest response.
            StaleEngineError: no policy has been loaded yet.
            WorkerDied: a worker died and the retry budget is spent.
            DeadlineExceeded: a chunk did not come back in time, and the retry budget is spent.
        """
        self.begin(prompts, sampling)
        rollouts = self.collect()
        self._waits = None  # the caller did nothing but wait
        return rollouts

    def begin(self, prompts: Sequence[Prompt], sampling: SamplingParams, *, resample_unfinished: bool = False) -> None:
        """Starts to sample a batch and returns at once; a batch begun before and not collected is abandoned.

        Args:
            resample_unfinished: chunks that are out when weights are loaded are dropped, and sampled from the new
                policy alone; otherwise it goes on where the old one was interrupted.

        Raises:
            DataError, StaleEngineError: as `generate`.
        """
        if self._weights is None:
            raise StaleEngineError("the rollout pool holds no policy yet: call load_weights before generate.")
        require_room(prompts, sampling, self._max_model_len)
        self._abandon()
        # A prompt not answered before counts as an average one.
        known = self._response_tokens
        average = sum(known.values()) / max(1, len(known))
        requests = rollout_requests(prompts, sampling)
        share = math.ceil(len(requests) / (CHUNKS_A_WORKER * len(self._workers)))
        ledger = ChunkLedger(
            requests,
            min(self._config.chunk_size, share),
            lambda request: known.get(request.prompt.id, average),
        )
        batch = Batch(ledger=ledger, sampling=sampling, resample_unfinished=resample_unfinished)
        self._batch = batch, self._sampler.submit(self._sample, batch)

    def collect(self) -> list[Rollout]:
        """Waits for the batch that was begun: `samples_per_prompt` rollouts per prompt, ordered by (prompt, sample).

        Raises:
            WorkerDied, DeadlineExceeded: as `generate`.
        """
        if self._batch is None:
            raise StaleEngineError("no batch was begun: call begin before collect.")
        asked = time.monotonic()
        batch, sampled = self._batch
        sampled.result()
        self._batch = None
        self._waits = RolloutWaits(
            rollout_s=batch.finished - batch.begun,
            learner_wait_s=max(0.0, batch.finished - asked),
            queue_wait_s=max(0.0, asked - batch.finished),
        )
        return batch.ledger.rollouts()

    def stream(self, waiting: deque[Asked]) -> Iterator[Rollout]:
        """One rollout for each prompt that waits, in the order in which they finish.

        Consumes `waiting`, which may grow while the rollouts are read: a rollout can be answered with the next turn of
        its conversation. Every engine has more in its queue than it can decode at once, and decodes on while the driver
        reads; a dead worker is replaced and what it held is asked again. New weights end what is not
        read to its end.

        Raises:
            As `generate`; the deadline is that of a call, which decodes for half a second.
        """
        if self._weights is None:
            raise StaleEngineError("the rollout pool holds no policy yet: call load_weights before stream.")
        self._abandon()
        numbers = count()
        held: dict[str, dict[int, Asked]] = {worker.name: {} for worker in self._workers}
        running: dict[Any, tuple[Worker, float]] = {}

        def advance(worker: Worker) -> None:
            """Gives the worker its share of what is open, and lets it decode."""
            mine = held[worker.name]
            share = math.ceil((sum(map(len, held.values())) + len(waiting)) / len(held))
            # As many wait in the engine as it decodes: more than finish during a call.
            room = min(share, 2 * self._config.max_sequences) - len(mine)
            submitted = {}
            for _ in range(min(room, len(waiting))):
                prompt, sampling = asked = waiting.popleft()
                require_room([prompt], sampling, self._max_model_len)
                [request] = rollout_requests([prompt], sampling)
                number = next(numbers)
                submitted[number], mine[number] = (request, sampling), asked
            if mine:
                running[worker.actor.advance.remote(submitted, SLICE_S)] = (worker, time.monotonic())

        while True:
            busy = {worker.name for worker, _ in running.values()}
            for worker in self._workers:
                if worker.name not in busy:
                    advance(worker)
            if not running:
                return
            reference = self._next_ready(running, "advance()")
            worker, _ = running.pop(reference)
            finished: dict[int, Rollout] = {}
            try:
                finished = self._answer(worker, reference, "advance()", self._deadlines.generate_s)
            except DIED as error:
                died = _died(worker, "advance()", self._config)
                [replacement], _ = self._load([self._replacement(worker, died, error)], self._weights)
                self._workers[self._workers.index(worker)] = replacement
                waiting.extendleft(reversed(held.pop(worker.name).values()))
                held[replacement.name] = {}
            else:
                for number in finished:
                    del held[worker.name][number]
                # Before the rollouts are read: the engine decodes meanwhile.
                advance(worker)
            yield from finished.values()

    def close(self) -> None:
        """Ends the workers; nothing of them needs saving."""
        self._restarts_left = 0  # the sampling thread must not replace what ends here
        self._abandon()
        for worker in (*self._workers, *self._joining):
            _end(worker)
        self._sampler.shutdown()
        self._workers, self._joining = [], []

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ the sampling thread

    def _sample(self, batch: Batch) -> None:
        """Hands out the chunks of a batch and takes the answers until it is complete, or nobody wants it."""
        try:
            while not batch.is_over:
                with self._turn:
                    self._turn.wait_for(self._may_hand_out)
                    wake_at = self._hand_out(batch)
                    if not self._calls:
                        continue
                # New weights bring deadlines forward: no wait is longer than a slice.
                left = min(wake_at - time.monotonic(), SLICE_S)
                ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=max(0.0, left))
                with self._turn:
                    if not batch.abandoned:
                        self._take_answers(batch, ready)
                    self._turn.notify_all()
            batch.finished = time.monotonic()
        except BaseException:
            with self._turn:
                batch.abandoned = True
                self._turn.notify_all()
            raise

    def _may_hand_out(self) -> bool:
        return self._held_back is None or bool(self._calls) or (self._held_back == "chunks" and bool(self._paused))

    def _hand_out(self, batch: Batch) -> float:
        """A chunk for every worker without one, while there are chunks. Returns when to look again at the latest."""
        now = time.monotonic()
        if self._held_back == "tokens":
            return min(call.deadline for call in self._calls.values())
        while self._paused:
            self._go_on(batch, replace(self._paused.pop(0), asked=now, allowed_s=self._deadlines.generate_s))
        for name in batch.ahead.keys() - {worker.name for worker in self._workers}:
            batch.ledger.release(batch.ahead.pop(name))
        busy = {call.worker.name for call in self._calls.values()}
        idle = [worker for worker in self._workers if worker.name not in busy]
        handed = {}
        for worker in idle:
            chunk = None if self._held_back else batch.ledger.issue(now, batch.ahead.pop(worker.name, None))
            if chunk is None:
                chunk = batch.ledger.issue_again(now)
                self._counts["issued again"] += chunk is not None
            if chunk is not None:
                handed[worker] = chunk
        # For all of them at once: of two workers, one that decodes more responses at a time ends later.
        reserved = {} if self._held_back else batch.ledger.reserve(now, [*handed.values()], len(self._workers))
        for worker, chunk in handed.items():
            ahead = reserved.get(chunk)
            if ahead is not None:
                batch.ahead[worker.name] = ahead
            reference = worker.actor.sample.remote(
                chunk.requests,
                batch.sampling,
                ahead.requests if ahead else (),
                seconds=SLICE_S,
                resample_unfinished=batch.resample_unfinished,
            )
            self._calls[reference] = Call(
                worker=worker, batch=batch, chunk=chunk, asked=now, allowed_s=self._deadlines.generate_s
            )
        next_deadline = min((call.deadline for call in self._calls.values()), default=math.inf)
        return min(next_deadline, batch.ledger.next_late_at()) if len(handed) < len(idle) else next_deadline

    def _go_on(self, batch: Batch, call: Call) -> None:
        """Lets a worker decode on, if it is still there and somebody waits for its chunk."""
        if call.worker not in self._workers or not self._wants(batch, call):
            self._put_back(call)
        else:
            self._calls[call.worker.actor.go_on.remote(seconds=SLICE_S)] = call

    def _wants(self, batch: Batch, call: Call) -> bool:
        """Whether the call's chunk has no answer yet, and none that new weights would outdate."""
        outdated = self._held_back is not None and batch.resample_unfinished
        return self._is_awaited(batch, call) and not outdated

    def _is_awaited(self, batch: Batch, call: Call) -> bool:
        return call.batch is batch and batch.ledger.wants(call.chunk)

    def _take_answers(self, batch: Batch, ready: Sequence[Any]) -> None:
        """Of the call that came back, and of those that never will: their workers hang."""
        now = time.monotonic()
        for reference in ready:
            call = self._calls.pop(reference)
            try:
                rollouts = self._answer(call.worker, reference, "sample()", self._deadlines.generate_s)
            except DIED as error:
                self._put_back(call)
                self._replace(call.worker, _died(call.worker, "sample()", self._config), error)
                continue
            except (PipelineError, RayTaskError):
                if call.batch is batch:
                    raise
                # Nobody waits for that batch any more, and so for its errors.
                self._counts["dropped"] += 1
                continue
            if not self._wants(batch, call):
                self._put_back(call)
                self._counts["dropped"] += 1
            elif rollouts is not None:
                batch.ledger.accept(call.chunk, rollouts, now)
                self._response_tokens |= {r.prompt.id: float(len(r.response_ids)) for r in rollouts}
            elif self._held_back == "tokens":
                # Two copies would go on as different samples, of which the first is the one with shorter responses.
                if any(other.chunk is call.chunk for other in self._paused):
                    self._counts["dropped"] += 1
                else:
                    self._paused.append(call)
            else:
                self._go_on(batch, call)
        late = [reference for reference, call in self._calls.items() if call.deadline <= now]
        # What nobody asked for since has come back in time: calls of a batch before, read when their turn comes.
        answered, _ = ray.wait(late, num_returns=len(late), timeout=0) if late else ([], [])
        for reference in set(late) - set(answered):
            call = self._calls.pop(reference)
            self._put_back(call)
            self._replace(call.worker, self._deadline_exceeded(call.worker, "sample()", round(call.allowed_s, 1)))

    def _put_back(self, call: Call) -> None:
        if not any(other.chunk is call.chunk for other in (*self._calls.values(), *self._paused)):
            call.batch.ledger.put_back(call.chunk)

    def _abandon(self) -> None:
        """Nobody will collect the batch: no more of it is handed out, and what is out is dropped when it comes back."""
        if self._batch is not None:
            self._batch[0].abandoned = True
            self._batch = None

    @contextmanager
    def _between(self, what: Between) -> Iterator[None]:
        """Inside, nothing is handed out and no engine decodes for the batch in the making: none has begun a chunk that
        it did not finish, or all stand between two tokens. Unless the batch wants to be sampled again, they go on."""
        with self._turn:
            self._held_back = what
            try:
                if self._batch is not None:
                    batch, _ = self._batch
                    if what == "chunks" or batch.resample_unfinished:
                        batch.give_up_ahead()
                    if what == "tokens":
                        self._expect_slices()
                    self._turn.wait_for(lambda: batch.is_over or not self._is_decoding(batch, what))
                    batch.ledger.interrupt()
                yield
            finally:
                self._held_back = None
                self._turn.notify_all()

    def _expect_slices(self) -> None:
        """A chunk may take long, but the learner waits now, and a worker that does not pause soon hangs."""
        now = time.monotonic()
        for reference, call in self._calls.items():
            allowed_s = min(call.allowed_s, now + self._deadlines.weights_s - call.asked)
            self._calls[reference] = replace(call, allowed_s=allowed_s)

    def _is_decoding(self, batch: Batch, what: Between) -> bool:
        if what == "chunks":
            return batch.ledger.is_out
        return any(self._is_awaited(batch, call) for call in self._calls.values())

    # ------------------------------------------------------------------ workers

    def _start_workers(self, count: int) -> list[Worker]:
        if self._placement is None:
            return [self._start_worker(None) for _ in range(count)]
        taken = {worker.bundle for worker in (*self._workers, *self._joining)}
        free = [bundle for bundle in range(self._placement.num_bundles) if bundle not in taken]
        return [self._start_worker(bundle) for bundle in free[: max(0, count)]]

    def _start_worker(self, bundle: int | None) -> Worker:
        config = self._config
        environment = {
            # New weights come as large tensors in fresh memory: a huge page is one fault for 2 MiB instead of 512.
            # glibc before 2.35 takes no notice.
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
            # The engine in the actor's own process: seconds to start instead of minutes.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # Triton's attention, which vLLM takes for float32, would otherwise round to 10 bits: TF32.
            "TRITON_F32_DEFAULT": "ieee",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if config.gpus_per_worker == 0:
            environment |= {
                "OMP_NUM_THREADS": str(config.threads_per_worker or max(1, int(config.cpus_per_worker))),
                "CUDA_VISIBLE_DEVICES": "",
            }
        name = f"rollout worker {self._num_started}"
        self._num_started += 1
        actor: Any = (
            ray.remote(self._worker_class)
            .options(
                num_cpus=config.cpus_per_worker,
                num_gpus=config.gpus_per_worker / (self._placement.tenants if self._placement else 1),
                scheduling_strategy=self._placement.strategy(bundle) if self._placement else "DEFAULT",
                runtime_env={"env_vars": environment},
                name=None if self._workspace is None else actor_name(name, self._workspace),
            )
            .remote(name)
        )
        return Worker(name=name, actor=actor, started=actor.start.remote(*self._start_arguments), bundle=bundle)

    def _send(self, sender: WeightSender) -> bool:
        """Whether the learner's GPUs have sent what it published into every engine."""
        self._workers = [self._up(worker) for worker in self._workers]
        try:
            sender.send({worker.name: worker.actor for worker in self._workers})
        except TransferFailed as error:
            logger.warning("%s", error)
            return False
        return True

    def _load(
        self, workers: Sequence[Worker], weights: PolicyWeights, *, received: bool = False
    ) -> tuple[list[Worker], list[Metrics]]:
        """Loads all workers at once, or passes them through the gate if they have received the weights already.

        Returns them, with the dead and hanging replaced, and their metrics, in order.
        """
        call = _loading(weights)
        calls = []
        for worker in workers:
            load = worker.actor.accept_weights if received else worker.actor.load_weights
            calls.append((worker, load.remote(weights, self._tolerance)))
        loaded, metrics = [], []
        for worker, reference in calls:
            while True:
                up = self._up(worker)
                if up is worker:
                    try:
                        metrics.append(self._answer(worker, reference, call, self._deadlines.weights_s))
                        break
                    except DIED as error:
                        up = self._replacement(worker, _died(worker, call, self._config), error)
                    except DeadlineExceeded as error:
                        # It may hang in a chunk that another worker has answered meanwhile.
                        up = self._replacement(worker, error, None)
                worker, reference = up, up.actor.load_weights.remote(weights, self._tolerance)
            loaded.append(worker)
        return loaded, metrics

    def _up(self, worker: Worker) -> Worker:
        """The worker once its engine has started, or the one that had to replace it."""
        while True:
            try:
                self._answer(worker, worker.started, "start()", self._deadlines.start_s)
            except DIED as error:
                worker = self._replacement(worker, _died(worker, "start()", self._config), error)
            else:
                return worker

    def _replace(self, worker: Worker, error: WorkerError, cause: Exception | None = None) -> None:
        """Puts a loaded worker in the place of one that is gone; who has left the pool before needs none."""
        if worker in self._workers and self._weights is not None:
            place = self._workers.index(worker)
            # In its place before it loads: `close` ends whom it finds there.
            self._workers[place] = self._replacement(worker, error, cause)
            [self._workers[place]], _ = self._load([self._workers[place]], self._weights)

    def _replacement(self, worker: Worker, error: WorkerError, cause: Exception | None) -> Worker:
        """A new worker for one that is gone or hangs, while the budget lasts; then the error."""
        _end(worker)  # it may only be out of reach
        if self._restarts_left == 0:
            raise error from cause
        self._restarts_left -= 1
        logger.warning("%s Replacing it, %d restarts left.", error, self._restarts_left)
        return self._start_worker(worker.bundle)

    def _answer(self, worker: Worker, reference: Any, call: str, deadline_s: float) -> Any:
        try:
            return ray.get(reference, timeout=deadline_s)
        except GetTimeoutError as error:
            raise self._deadline_exceeded(worker, call, deadline_s) from error
        except RayTaskError as error:
            if isinstance(error.cause, PipelineError):
                raise error.cause from error
            raise

    def _next_ready(self, running: Mapping[Any, tuple[Worker, float]], call: str) -> Any:
        """The next call to come back, of those issued to a worker at a time; none may take longer than the deadline."""
        worker, issued = min(running.values(), key=lambda assignment: assignment[1])
        left = self._deadlines.generate_s - (time.monotonic() - issued)
        ready, _ = ray.wait(list(running), num_returns=1, timeout=max(0.0, left))
        if not ready:
            raise self._deadline_exceeded(worker, call, self._deadlines.generate_s)
        return ready[0]

    def _deadline_exceeded(self, worker: Worker, call: str, deadline_s: float) -> DeadlineExceeded:
        free = ray.available_resources()
        return DeadlineExceeded(
            f"{worker.name}: {call} did not return within {deadline_s:g} s. It hangs, is slow, or waits for a place "
            f"(it needs {self._config.cpus_per_worker:g} CPU and {self._config.gpus_per_worker:g} GPU; "
            f"{free.get('CPU', 0):g} and {free.get('GPU', 0):g} are free). See its log; lower "
            "cluster.rollout.chunk_size or workers, or raise cluster.deadlines."
        )


def _loading(weights: PolicyWeights) -> str:
    return f"load_weights() of policy version {weights.version}"


def _died(worker: Worker, call: str, config: RolloutConfig) -> WorkerDied:
    return WorkerDied(
        f"{worker.name} died during {call}; the budget is {config.max_restarts} restarts "
        "(cluster.rollout.max_restarts). Often it ran out of memory: lower kv_cache_gib or max_sequences. The "
        "workspace is intact; the same command resumes."
    )


def _has_started(worker: Worker) -> bool:
    """Or failed to."""
    ready, _ = ray.wait([worker.started], timeout=0)
    return bool(ready)


def _end(worker: Worker) -> None:
    ray.kill(worker.actor, no_restart=True)
