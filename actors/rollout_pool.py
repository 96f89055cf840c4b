"""The pool of rollout workers: hands out requests, replaces workers, resizes. Implements `RolloutSource`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.rank_group import gather
from actors.rollout_worker import RolloutRequest, RolloutWorker
from pipeline.config.schema import DeadlinesConfig, RolloutConfig
from pipeline.data.batching import stable_seed
from pipeline.errors import DeadlineExceeded, PipelineError, WorkerDied
from pipeline.records import Metrics, PolicyWeights, Prompt, Rollout, SamplingParams


class RolloutPool:
    """n engines behind one port. Which worker answers a request, and how many there are, changes nothing but the speed."""

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
    ) -> None:
        self._arguments = (model_directory, config, dtype, max_model_len, seed)
        self._config = config
        self._deadlines = deadlines
        self._tolerance = gate_tolerance
        self._weights: PolicyWeights | None = None
        self._restarts_left = config.max_restarts
        self._number = 0
        self._workers: list[Any] = []
        self.resize(config.workers)

    def resize(self, num_workers: int) -> None:
        """Grows or shrinks the pool between batches. A joining worker loads the current weights and passes the gate."""
        while len(self._workers) > num_workers:
            ray.kill(self._workers.pop(), no_restart=True)
        joining = [self._start_worker() for _ in range(num_workers - len(self._workers))]
        self._workers += joining
        if joining and self._weights is not None:
            self._load(joining, self._weights)

    @property
    def num_workers(self) -> int:
        return len(self._workers)

    def load_weights(self, weights: PolicyWeights) -> Metrics:
        self._weights = weights
        metrics = self._load(self._workers, weights)
        return {
            "gate/mean": max(m["gate/mean"] for m in metrics),
            "gate/max": max(m["gate/max"] for m in metrics),
            "weights/seconds": max(m["weights/seconds"] for m in metrics),
            "weights/gb_per_s": min(m["weights/gb_per_s"] for m in metrics),
        }

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Samples in chunks, handed to whichever worker is free; a dead worker is replaced and its chunk issued again.

        Raises:
            WorkerDied: a worker died and the retry budget is spent.
            DeadlineExceeded: a chunk did not come back in time.
        """
        requests = [
            RolloutRequest(prompt=prompt, sample_index=i, seed=stable_seed("sample", sampling.seed, prompt.id, n, i))
            for n, prompt in enumerate(prompts)
            for i in range(sampling.samples_per_prompt)
        ]
        size = self._config.chunk_size
        waiting = deque((first, requests[first : first + size]) for first in range(0, len(requests), size))
        idle = list(self._workers)
        running: dict[Any, tuple[Any, int, list[RolloutRequest], float]] = {}
        results: dict[int, list[Rollout]] = {}
        while waiting or running:
            while idle and waiting:
                worker, (first, chunk) = idle.pop(), waiting.popleft()
                running[worker.sample.remote(chunk, sampling)] = (worker, first, chunk, time.monotonic())
            reference = self._next_ready(running)
            worker, first, chunk, _ = running.pop(reference)
            try:
                results[first] = ray.get(reference)
            except RayActorError as error:
                worker = self._replace(worker, f"sampling {len(chunk)} responses", error)
                waiting.appendleft((first, chunk))
            except RayTaskError as error:
                if isinstance(error.cause, PipelineError):
                    raise error.cause from error
                raise
            idle.append(worker)
        return [rollout for first in sorted(results) for rollout in results[first]]

    def close(self) -> None:
        for worker in self._workers:
            ray.kill(worker, no_restart=True)
        self._workers = []

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ workers

    def _start_worker(self) -> Any:
        config = self._config
        environment = {
            # The engine in the actor's own process: seconds to start instead of minutes.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if config.gpus_per_worker == 0:
            environment |= {
                "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
                "OMP_NUM_THREADS": str(max(1, int(config.cpus_per_worker))),
                "CUDA_VISIBLE_DEVICES": "",
            }
        name = f"rollout worker {self._number}"
        self._number += 1
        return (
            ray.remote(RolloutWorker)
            .options(
                num_cpus=config.cpus_per_worker,
                num_gpus=config.gpus_per_worker,
                runtime_env={"env_vars": environment},
            )
            .remote(name, *self._arguments)
        )

    def _load(self, workers: Sequence[Any], weights: PolicyWeights) -> list[Metrics]:
        # A worker that has just been started answers once its engine is up: allow for both.
        deadline_s = self._deadlines.start_s + self._deadlines.weights_s
        while True:
            try:
                return gather(
                    [worker.load_weights.remote(weights, self._tolerance) for worker in workers],
                    who="rollout pool",
                    doing=f"loading policy version {weights.version}",
                    deadline_s=deadline_s,
                )
            except WorkerDied as error:
                workers = [self._replace_if_dead(worker, error) for worker in workers]

    def _replace_if_dead(self, worker: Any, error: WorkerDied) -> Any:
        try:
            ray.get(worker.__ray_ready__.remote(), timeout=self._deadlines.start_s)
        except RayActorError:
            return self._replace(worker, "loading weights", error, load=False)
        return worker

    def _replace(self, worker: Any, doing: str, error: Exception, *, load: bool = True) -> Any:
        if self._restarts_left == 0:
            raise WorkerDied(
                f"a rollout worker died while {doing}, and the budget of {self._config.max_restarts} restarts "
                "(cluster.rollout.max_restarts) is spent. Often it ran out of memory: lower kv_cache_gib or "
                "max_sequences. The workspace is intact; the same command resumes."
            ) from error
        self._restarts_left -= 1
        slot = self._workers.index(worker)
        self._workers[slot] = self._start_worker()
        if load and self._weights is not None:
            self._load([self._workers[slot]], self._weights)
        return self._workers[slot]  # loading may have replaced it once more

    def _next_ready(self, running: dict[Any, tuple[Any, int, list[RolloutRequest], float]]) -> Any:
        oldest = min(started for *_, started in running.values())
        left = self._deadlines.generate_s - (time.monotonic() - oldest)
        ready, _ = ray.wait(list(running), num_returns=1, timeout=max(0.0, left))
        if not ready:
            raise DeadlineExceeded(
                f"rollout pool: a chunk of {self._config.chunk_size} responses did not come back within "
                f"{self._deadlines.generate_s:.0f} s. The worker hangs or is slow: see its log, lower "
                "cluster.rollout.chunk_size or raise cluster.deadlines.generate_s."
            )
        return ready[0]
