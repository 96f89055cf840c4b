"""The pool of rollout workers: hands out requests, replaces workers, resizes. Implements `RolloutSource`."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from actors.rollout_worker import RolloutWorker
from pipeline.config.schema import DeadlinesConfig, RolloutConfig
from pipeline.data.sampling import RolloutRequest, require_room, rollout_requests
from pipeline.errors import ConfigError, DeadlineExceeded, PipelineError, StaleEngineError, WorkerDied
from pipeline.records import Metrics, PolicyWeights, Prompt, Rollout, SamplingParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Worker:
    """The driver's hold on one rollout worker."""

    name: str
    actor: Any
    started: Any
    """Reference that resolves when the engine is up, or raises why it is not."""


ADVANCE_S = 0.5
"""How long an engine decodes before it reports what finished and takes new requests."""

Asked = tuple[Prompt, SamplingParams]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive requests, sampled by one worker at a time."""

    number: int
    requests: Sequence[RolloutRequest]


class RolloutPool:
    """n engines behind one port. How many there are, and which one answers a request, changes nothing but the speed.

    Seeds belong to requests, not to workers. That suffices where an engine's logits do not depend on what shares a
    batch: float32 on CPU gave 170,000 tokens and their logprobs bit for bit, however they were chunked. GPU kernels may
    choose by batch size; then a token drawn within a rounding error of a boundary can come out differently.
    """

    def __init__(
        self,
        model_directory: str,
        config: RolloutConfig,
        deadlines: DeadlinesConfig,
        *,
        dtype: str,
        max_model_len: int,
        gate_tolerance: float,
        seed: int,
        worker: type = RolloutWorker,
        requested_workers: Callable[[], int | None] = lambda: None,
    ) -> None:
        """Starts the workers and returns at once; the first `load_weights` waits for them.

        Args:
            model_directory: config and tokenizer files; weights there are not read.
            max_model_len: tokens of prompt and response together.
            gate_tolerance: largest mean absolute logprob difference to the learner, nats.
            worker: what runs in each Ray actor.
            requested_workers: asked between batches; the pool grows or shrinks to what it says, None changes nothing.
        """
        if config.gpus_per_worker > 1:
            raise ConfigError(
                f"cluster.rollout.gpus_per_worker is {config.gpus_per_worker:g}, but an engine runs on one GPU. "
                "Set it to 1 and raise cluster.rollout.workers."
            )
        self._worker_class = worker
        self._start_arguments = (model_directory, config, dtype, max_model_len, seed)
        self._max_model_len = max_model_len
        self._config = config
        self._deadlines = deadlines
        self._tolerance = gate_tolerance
        self._weights: PolicyWeights | None = None
        self._restarts_left = config.max_restarts
        self._num_started = 0
        self._workers: list[Worker] = []
        self._requested_workers = requested_workers
        self._joining: list[Worker] = []
        self._given_up: int | None = None
        self.resize(config.workers)

    @property
    def num_workers(self) -> int:
        return len(self._workers)

    def resize(self, num_workers: int) -> None:
        """Grows or shrinks the pool between batches. A joining worker loads the current weights and passes the gate."""
        if num_workers < 1:
            raise ConfigError(f"a rollout pool of {num_workers} workers cannot sample; ask for at least 1.")
        while len(self._workers) > num_workers:
            _end(self._workers.pop())
        joining = [self._start_worker() for _ in range(num_workers - len(self._workers))]
        if joining and self._weights is not None:
            joining, _ = self._load(joining, self._weights)
        self._workers += joining

    def _follow_request(self) -> None:
        """Shrinks at once; grows without waiting: a worker that starts while others sample joins at the next update."""
        wanted = self._requested_workers()
        if wanted is None:
            return
        while self._joining and len(self._workers) + len(self._joining) > wanted:
            _end(self._joining.pop())
        while len(self._workers) > wanted:
            _end(self._workers.pop())
        if wanted != self._given_up:
            self._joining += [self._start_worker() for _ in range(wanted - len(self._workers) - len(self._joining))]
        for worker in list(self._joining):
            ready, _ = ray.wait([worker.started], timeout=0)
            if ready:
                self._joining.remove(worker)
                self._join(worker, wanted)

    def _join(self, worker: Worker, wanted: int) -> None:
        try:
            ray.get(worker.started)
        except (RayActorError, RayTaskError) as error:
            # The run goes on with the workers it has: a request from outside must not end it.
            self._given_up = wanted
            logger.warning("%s, asked for from outside, did not start: %s", worker.name, error)
        else:
            self._workers.append(worker)

    def load_weights(self, weights: PolicyWeights) -> Metrics:
        """Gives every engine the published policy; the slowest engine and the widest gap make the metrics.

        Raises:
            StaleEngineError: an engine does not reproduce the learner's probe log-probabilities.
            WorkerDied, DeadlineExceeded: a worker is gone, or does not answer.
        """
        self._follow_request()
        self._weights = weights
        self._workers, metrics = self._load(self._workers, weights)
        return {
            "rollout/workers": float(len(self._workers)),
            "gate/mean": max(m["gate/mean"] for m in metrics),
            "gate/max": max(m["gate/max"] for m in metrics),
            "weights/seconds": max(m["weights/seconds"] for m in metrics),
            "weights/gb_per_s": min(m["weights/gb_per_s"] for m in metrics),
        }

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Samples in chunks, handed to whichever worker is free; a dead worker is replaced and its chunk issued again.

        Raises:
            DataError: a prompt leaves no room for the longest response.
            StaleEngineError: no policy has been loaded yet.
            WorkerDied: a worker died and the retry budget is spent.
            DeadlineExceeded: a chunk did not come back in time.
        """
        if self._weights is None:
            raise StaleEngineError("the rollout pool holds no policy yet: call load_weights before generate.")
        require_room(prompts, sampling, self._max_model_len)
        requests = rollout_requests(prompts, sampling)
        size = self._config.chunk_size
        waiting = deque(
            Chunk(number=number, requests=requests[first : first + size])
            for number, first in enumerate(range(0, len(requests), size))
        )
        idle = list(self._workers)
        running: dict[Any, tuple[Worker, float]] = {}
        chunks: dict[Any, Chunk] = {}
        results: dict[int, list[Rollout]] = {}
        while waiting or running:
            while idle and waiting:
                worker, chunk = idle.pop(), waiting.popleft()
                reference = worker.actor.sample.remote(chunk.requests, sampling)
                running[reference], chunks[reference] = (worker, time.monotonic()), chunk
            reference = self._next_ready(running, "sample()")
            (worker, _), chunk = running.pop(reference), chunks.pop(reference)
            try:
                results[chunk.number] = self._answer(worker, reference, "sample()", self._deadlines.generate_s)
            except RayActorError as error:
                [replacement], _ = self._load([self._replacement(worker, "sample()", error)], self._weights)
                self._workers[self._workers.index(worker)] = worker = replacement
                waiting.appendleft(chunk)
            idle.append(worker)
        return [rollout for number in sorted(results) for rollout in results[number]]

    def stream(self, waiting: deque[Asked]) -> Iterator[Rollout]:
        """One rollout for each prompt that waits, in the order in which they finish.

        Consumes `waiting`, which may grow while the rollouts are read: a rollout can be answered with the next turn of
        its conversation. Every engine has more in its queue than it can decode at once, and decodes on while the driver
        reads; a dead worker is replaced and what it held is asked again. Read to the end, or close the pool: engines
        with open requests refuse new weights.

        Raises:
            As `generate`; the deadline is that of a call, which decodes for half a second.
        """
        if self._weights is None:
            raise StaleEngineError("the rollout pool holds no policy yet: call load_weights before stream.")
        numbers = count()
        held: dict[str, dict[int, Asked]] = {worker.name: {} for worker in self._workers}
        running: dict[Any, tuple[Worker, float]] = {}

        def advance(worker: Worker) -> None:
            """Gives the worker its share of what is open, and lets it decode."""
            mine = held[worker.name]
            share = math.ceil((sum(map(len, held.values())) + len(waiting)) / len(held))
            room = min(share, self._config.max_sequences + self._config.chunk_size) - len(mine)
            submitted = {}
            for _ in range(min(room, len(waiting))):
                prompt, sampling = asked = waiting.popleft()
                require_room([prompt], sampling, self._max_model_len)
                [request] = rollout_requests([prompt], sampling)
                number = next(numbers)
                submitted[number], mine[number] = (request, sampling), asked
            if mine:
                running[worker.actor.advance.remote(submitted, ADVANCE_S)] = (worker, time.monotonic())

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
            except RayActorError as error:
                [replacement], _ = self._load([self._replacement(worker, "advance()", error)], self._weights)
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
        for worker in (*self._workers, *self._joining):
            _end(worker)
        self._workers, self._joining = [], []

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ workers

    def _start_worker(self) -> Worker:
        config = self._config
        environment = {
            # The engine in the actor's own process: seconds to start instead of minutes.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if config.gpus_per_worker == 0:
            environment |= {
                "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
                "OMP_NUM_THREADS": str(config.threads_per_worker or max(1, int(config.cpus_per_worker))),
                "CUDA_VISIBLE_DEVICES": "",
            }
        name = f"rollout worker {self._num_started}"
        self._num_started += 1
        actor = (
            ray.remote(self._worker_class)
            .options(
                num_cpus=config.cpus_per_worker,
                num_gpus=config.gpus_per_worker,
                runtime_env={"env_vars": environment},
            )
            .remote(name)
        )
        return Worker(name=name, actor=actor, started=actor.start.remote(*self._start_arguments))

    def _load(self, workers: Sequence[Worker], weights: PolicyWeights) -> tuple[list[Worker], list[Metrics]]:
        """Loads all workers at once. Returns them, with the dead ones replaced, and their metrics, in order."""
        call = f"load_weights() of policy version {weights.version}"
        calls = [(worker, worker.actor.load_weights.remote(weights, self._tolerance)) for worker in workers]
        loaded, metrics = [], []
        for worker, reference in calls:
            while True:
                try:
                    self._answer(worker, worker.started, "start()", self._deadlines.start_s)
                    metrics.append(self._answer(worker, reference, call, self._deadlines.weights_s))
                    break
                except RayActorError as error:
                    worker = self._replacement(worker, call, error)
                    reference = worker.actor.load_weights.remote(weights, self._tolerance)
            loaded.append(worker)
        return loaded, metrics

    def _replacement(self, dead: Worker, call: str, error: RayActorError) -> Worker:
        """A new worker for a dead one, while the budget lasts."""
        _end(dead)  # it may only be out of reach
        if self._restarts_left == 0:
            raise WorkerDied(
                f"{dead.name} died during {call}, and the budget of {self._config.max_restarts} restarts "
                "(cluster.rollout.max_restarts) is spent. Often it ran out of memory: lower kv_cache_gib or "
                "max_sequences. The workspace is intact; the same command resumes."
            ) from error
        self._restarts_left -= 1
        logger.warning("%s died during %s; replacing it, %d restarts left", dead.name, call, self._restarts_left)
        return self._start_worker()

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


def _end(worker: Worker) -> None:
    ray.kill(worker.actor, no_restart=True)
