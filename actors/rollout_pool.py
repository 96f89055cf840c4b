"""The pool of rollout workers, as the loops see it: `BackgroundRolloutSource` and `RolloutStream` over Ray actors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import TracebackType
from typing import Any

import ray

from actors.rollout_fleet import PolicySender, RolloutFleet
from actors.rollout_sampler import BatchSampler
from actors.rollout_stream import PromptToSample, StreamSampler
from actors.worker_handle import UNSHARED_ACTORS, EngineSettings, WorkerActors
from cluster.autoscaler import Autoscaler, RolloutWaits
from cluster.engine_build import resolve_rollout
from pipeline.columns import Rollouts
from pipeline.config.cluster import DeadlinesConfig, RolloutConfig
from pipeline.errors import ConfigError, StaleEngineError
from pipeline.models.tensor_parallel import check_shards_of
from pipeline.records import Metrics, PolicyWeights, Prompt, Rollout, SamplingParams
from pipeline.rollouts.requests import require_room


class RolloutPool:
    """n engines behind one port. How many there are, and which one answers a request, changes nothing but the speed.

    Seeds belong to requests, not to workers. That suffices where an engine's logits do not depend on what shares a
    batch: float32 on CPU gave 170,000 tokens and their logprobs bit for bit, however they were chunked. GPU kernels may
    choose by batch size; then a token drawn within a rounding error of a boundary can come out differently.

    The pool composes three parts: a fleet of workers, a sampler of batches with a thread of its own, and a sampler of
    streams. All methods belong to one thread, the caller's. A load interrupts the engines between two tokens.
    Responses that were begun go on with the new weights, or begin anew.
    """

    def __init__(
        self,
        engine: EngineSettings,
        config: RolloutConfig,
        deadlines: DeadlinesConfig,
        *,
        actors: WorkerActors = UNSHARED_ACTORS,
        requested_workers: Callable[[], int | None] = lambda: None,
        autoscaler: Autoscaler | None = None,
    ) -> None:
        """Starts the workers and returns at once; the first `load_weights` waits for them.

        Args:
            engine: what each engine is started with.
            actors: which Ray actors hold the engines.
            requested_workers: asked between batches; the pool grows or shrinks to what it says, None changes nothing.
            autoscaler: asked where `requested_workers` says None.

        Raises:
            ConfigError: the shards of an engine do not divide the model. Nothing has been started.
        """
        self._max_model_len = engine.max_model_len
        resolved = resolve_rollout(config)
        check_shards_of(engine.model_uri, resolved.shards)
        self._max_sequences = resolved.max_sequences
        self._most_workers = actors.most
        self._deadlines = deadlines
        self._requested_workers = requested_workers
        self._autoscaler = autoscaler
        self._fleet = RolloutFleet(engine, resolved, deadlines, actors)
        self._sampler = BatchSampler(
            self._fleet,
            chunk_size=resolved.chunk_size,
            generate_s=deadlines.generate_s,
            weights_s=deadlines.weights_s,
        )
        self._given_up: int | None = None
        """The size that a worker could not be found for; not tried again until another one is asked for."""
        self._waits: RolloutWaits | None = None
        """Who waited for whom in the last batch that was sampled while the learner worked."""
        self.resize(resolved.workers)

    # ------------------------------------------------------------------ workers

    @property
    def num_workers(self) -> int:
        return len(self._fleet.workers)

    @property
    def first_worker(self) -> Any:
        """The Ray handle of a worker that serves."""
        return self._fleet.workers[0].actor

    def resize(self, num_workers: int) -> None:
        """Grows or shrinks the pool between chunks. A joining worker loads the current weights and passes the gate.

        Waits until workers have finished the chunks that they have, then for those that join. Unblocked by their
        answers, and by the deadlines after which a hanging worker is replaced.

        Raises:
            ConfigError: no pool here can have this size.
            StaleEngineError, WorkerDied, DeadlineExceeded: as `load_weights`; the pool keeps its size.
        """
        if num_workers < 1:
            raise ConfigError(f"a rollout pool of {num_workers} workers cannot sample; ask for at least 1.")
        most = self._most_workers
        if most is not None and num_workers > most:
            raise ConfigError(
                f"{num_workers} rollout workers do not fit the learner's {most} GPUs, which hold one "
                f"each. Ask for {most}, or set cluster.rollout.placement=disaggregated."
            )
        with self._sampler.paused(between="chunks"):
            self._fleet.resize(num_workers)

    def fed_by(self, sender: PolicySender) -> AbstractContextManager[None]:
        """Within it, engines that can take weights from the learner's GPUs do; the sender sends what is published.

        Who joins later or replaces a dead worker reads the published file, and so do all when a transfer fails.
        """
        return self._fleet.fed_by(sender)

    def sleep(self) -> None:
        """Engines that share the learner's GPUs leave them to it until the next `load_weights`; others stay awake.

        Between batches only. A worker that does not fall asleep is ended, and replaced when weights are loaded. Waits
        until every engine has started and sleeps, each at most `cluster.deadlines.start_s`.
        """
        if self._fleet.shares_gpus:
            with self._sampler.paused(between="chunks"):
                self._fleet.sleep()

    def load_weights(self, weights: PolicyWeights) -> Metrics:
        """Gives every engine the published policy; the slowest engine and the widest gap make the metrics.

        Responses in the making are interrupted. The new policy goes on with them, or they begin anew if the batch was
        begun with `resample_unfinished`. Only before the pool shrinks, workers finish the chunks that would go on.

        Waits until the engines stand between two tokens, at most for `cluster.deadlines.weights_s`; then for the
        slowest engine to load. Unblocked by the engines' answers, and by the deadlines.

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
        shrinks = wanted is not None and wanted < self.num_workers
        with self._sampler.paused(between="chunks" if shrinks else "tokens"):
            joining = self._fleet.follow(wanted, may_grow=wanted != self._given_up, patience_s=self._deadlines.start_s)
            served, sent_between_gpus = self._fleet.load_weights(weights)
            joined, is_any_dropped = self._fleet.join(joining, weights)
            if is_any_dropped:
                self._given_up = wanted
            counts = self._sampler.take_counts()
        waits, self._waits = self._waits, None
        metrics = {} if waits is None else _wait_metrics(waits)
        if sent_between_gpus is not None:
            metrics["weights/sent_between_gpus"] = float(sent_between_gpus)
        return metrics | {
            "rollout/workers": float(self.num_workers),
            "rollout/chunks_issued_again": float(counts["issued again"]),
            "rollout/answers_dropped": float(counts["dropped"]),
            **_load_metrics(weights, [*served, *joined]),
        }

    def close(self) -> None:
        """Ends the workers; nothing of them needs saving. Waits for the sampling thread, unblocked by their end."""
        self._sampler.abandon()
        self._fleet.end()
        self._sampler.close()
        self._fleet.forget()

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wanted_workers(self) -> int | None:
        """The number that an operator or the autoscaler asks for, as far as there is room; None changes nothing."""
        wanted = self._requested_workers()
        if wanted is None and self._autoscaler is not None:
            wanted = self._autoscaler.target_workers(self.num_workers, self._waits)
        if wanted is None or self._most_workers is None:
            return wanted
        return min(wanted, self._most_workers)

    # ------------------------------------------------------------------ rollouts

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Rollouts:
        """Samples in chunks, handed to whichever worker is free, which begins with another before it is done; a worker
        that dies or hangs is replaced and its chunks issued again.

        Waits for all of them; unblocked by the last answer, or by the error of the sampling thread.

        Raises:
            DataError: a prompt leaves no room for the longest response.
            StaleEngineError: no policy has been loaded yet.
            WorkerDied: a worker died and the retry budget is spent.
            DeadlineExceeded: a chunk did not come back in time, and the retry budget is spent.
        """
        waits = self._waits  # of a batch that was sampled beside the learner: a validation comes after it
        self.begin(prompts, sampling)
        rollouts = self.collect()
        self._waits = waits  # of these the caller did nothing but wait
        return rollouts

    def begin(self, prompts: Sequence[Prompt], sampling: SamplingParams, *, resample_unfinished: bool = False) -> None:
        """Starts to sample a batch and returns at once; a batch begun before and not collected is abandoned.

        Args:
            resample_unfinished: chunks that are out when weights are loaded are dropped, and sampled from the new
                policy alone; otherwise it goes on where the old one was interrupted.

        Raises:
            DataError, StaleEngineError: as `generate`.
        """
        self._require_policy("generate")
        require_room(prompts, sampling, self._max_model_len)
        self._sampler.begin(prompts, sampling, resample_unfinished=resample_unfinished)

    def collect(self) -> Rollouts:
        """Consumes the batch that was begun: `samples_per_prompt` rollouts per prompt, ordered by (prompt, sample).

        Waits for the batch; unblocked by the last answer, or by the error of the sampling thread.

        Raises:
            StaleEngineError: no batch was begun.
            WorkerDied, DeadlineExceeded: as `generate`.
        """
        rollouts, self._waits = self._sampler.collect()
        return rollouts

    def stream(self, waiting: deque[PromptToSample]) -> Iterator[Rollout]:
        """One rollout for each prompt that waits, in the order in which they finish.

        Consumes `waiting`, which may grow while the rollouts are read: a rollout can be answered with the next turn of
        its conversation. Every engine has more in its queue than it can decode at once, and decodes on while the driver
        reads; a dead worker is replaced, and its requests are submitted again. New weights end a stream that is not
        read to its end. A batch that was begun is abandoned.

        Waits for the next engine to finish half a second of decoding; unblocked by its answer, or by the deadline.

        Raises:
            As `generate`; the deadline is that of a call, which decodes for half a second.
        """
        self._require_policy("stream")
        self._sampler.abandon()
        sampler = StreamSampler(
            self._fleet,
            max_model_len=self._max_model_len,
            max_sequences=self._max_sequences,
            generate_s=self._deadlines.generate_s,
        )
        yield from sampler.rollouts(waiting)

    def _require_policy(self, before: str) -> None:
        if self._fleet.policy is None:
            raise StaleEngineError(f"the rollout pool holds no policy yet: call load_weights before {before}.")


def _wait_metrics(waits: RolloutWaits) -> Metrics:
    return {
        "rollout/seconds": waits.rollout_s,
        "rollout/learner_wait_s": waits.learner_wait_s,
        "rollout/queue_wait_s": waits.queue_wait_s,
    }


def _load_metrics(weights: PolicyWeights, workers: Sequence[Metrics]) -> Metrics:
    """Metrics of a load by these workers: the widest gap, the slowest engine, the copies of all, the most memory."""
    written = {} if weights.file_follows else {"weights/written_gb_per_s": weights.written_gb_per_s}
    return written | {
        "gate/mean": max(m["gate/mean"] for m in workers),
        "gate/max": max(m["gate/max"] for m in workers),
        "weights/seconds": max(m["weights/seconds"] for m in workers),
        "weights/gb_per_s": min(m["weights/gb_per_s"] for m in workers),
        "weights/copy_gb_per_s": min(m["weights/copy_gb_per_s"] for m in workers),
        "weights/copies_fetched": sum(m["weights/copies_fetched"] for m in workers),
        "memory/rollout_worker_peak_gib": max(m["memory/rollout_worker_peak_gib"] for m in workers),
    }
