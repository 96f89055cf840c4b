"""A rollout worker: one vLLM engine in a Ray actor."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from cluster.engine_build import ResolvedRolloutConfig
from cluster.rollout_plan import RolloutPlan
from pipeline.records import Metrics, PolicyWeights, Rollout, SamplingParams
from pipeline.rollouts.engine_sampler import EngineSampler
from pipeline.rollouts.numerics_gate import check_engine
from pipeline.rollouts.requests import RolloutRequest
from pipeline.stages import storage
from pipeline.tracking.trace_recorder import TraceRecorder

if TYPE_CHECKING:
    from pipeline.columns import Rollouts

COPIED_BYTES = 256 * 2**20
"""Copied at most, to measure once how fast the engine's memory is: more than a cache holds, and quickly done."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """How the weights of the last policy came into the engine."""

    seconds: float
    num_bytes: int
    copies_fetched: int = 0
    """1 where this worker brought the published file to its node; its neighbours read the same copy."""


class RolloutWorker:
    """Holds an engine, gives it weights, and passes requests to its sampler."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._copy_gb_per_s: float | None = None
        self._trace = TraceRecorder()

    def start_profile(self) -> None:
        self._trace.start()

    def stop_profile(self, uri: str, file: str) -> None:
        with storage.writing(uri) as directory:
            self._trace.stop(os.path.join(directory, file))

    def start(
        self,
        model_uri: str,
        config: ResolvedRolloutConfig,
        plan: RolloutPlan,
        dtype: str,
        max_model_len: int,
        seed: int,
    ) -> None:
        """Builds the engine. Not the constructor's work: an error here reaches the caller, there it ends the actor."""
        from pipeline.data.chat import decode_response
        from pipeline.models.backbone import load_config, load_tokenizer, stop_token_ids

        with storage.reading(model_uri) as directory:
            model = load_config(directory)
            tokenizer = load_tokenizer(directory)
            # After the tokenizer: its module imports transformers the quick way.
            import torch

            from actors.vllm_engine import VLLMEngine
            from pipeline.learning.memory import keep_freed_memory

            if config.gpus_per_worker == 0:
                keep_freed_memory(torch.device("cpu"))

            self._engine = VLLMEngine(
                directory,
                config,
                plan=plan,
                dtype=dtype,
                max_model_len=max_model_len,
                stop_token_ids=stop_token_ids(directory, model, tokenizer),
                seed=seed,
            )
        self._sampler = EngineSampler(self._engine, partial(decode_response, tokenizer), name=self._name)

    def sleep(self) -> None:
        """Leaves the GPU to the learner; the next weights wake the engine."""
        self._sampler.interrupt()
        self._engine.sleep()

    def load_weights(self, weights: PolicyWeights, tolerance: float) -> Metrics:
        """Loads a published policy and passes the gate; until it has, this worker samples nothing."""
        from actors.weight_relay import readable_here

        self._sampler.interrupt()
        started = time.perf_counter()
        weights, is_fetched = readable_here(weights)
        with self._trace.phase("weights"):
            num_bytes = self._engine.load_weights(weights.location)
        seconds = time.perf_counter() - started
        self._transfer = Transfer(seconds=seconds, num_bytes=num_bytes, copies_fetched=int(is_fetched))
        return self.accept_weights(weights, tolerance)

    # The learner's first rank, not the driver, calls the next four methods (`actors/weight_sender.py`).

    def meet_learner(self, init_info: dict[str, Any]) -> None:
        self._engine.meet_learner(init_info)

    def start_update(self) -> None:
        self._sampler.interrupt()
        self._update_started, self._update_bytes = time.perf_counter(), 0
        self._engine.start_update()

    def receive(self, update_info: dict[str, Any]) -> None:
        self._engine.receive(update_info)
        self._update_bytes += update_bytes(update_info)

    def finish_update(self) -> None:
        self._engine.finish_update()
        seconds = time.perf_counter() - self._update_started
        self._transfer = Transfer(seconds=seconds, num_bytes=self._update_bytes)

    def accept_weights(self, weights: PolicyWeights, tolerance: float) -> Metrics:
        """Passes the gate with the weights in the engine, however they came; then this worker samples from them."""
        from actors.weight_relay import readable_here

        # vLLM answers the probes together with whatever else it decodes, for instance requests that were submitted
        # ahead of a call that another worker has answered.
        self._sampler.interrupt()
        gate = check_engine(
            weights.probes,
            self._engine.probe_logprobs(weights.probes),
            tolerance=tolerance,
            engine=self._name,
            version=weights.version,
            differing_groups=lambda: self._engine.differing_groups(readable_here(weights)[0].location),
        )
        self._sampler.accept_policy(weights.version)
        seconds, num_bytes = self._transfer.seconds, self._transfer.num_bytes
        if self._copy_gb_per_s is None:
            self._copy_gb_per_s = self._engine.copy_gb_per_s(min(num_bytes, COPIED_BYTES))
        return gate | {
            "weights/seconds": seconds,
            "weights/gb_per_s": num_bytes / 1e9 / seconds,
            "weights/copy_gb_per_s": self._copy_gb_per_s,
            "weights/copies_fetched": float(self._transfer.copies_fetched),
            "memory/rollout_worker_peak_gib": self._engine.peak_gib(),
        }

    # Sampling: arguments, results and errors are those of `EngineSampler`.

    def sample(
        self,
        requests: Sequence[RolloutRequest],
        sampling: SamplingParams,
        ahead: Sequence[RolloutRequest] = (),
        *,
        seconds: float = math.inf,
        resample_unfinished: bool = False,
    ) -> Rollouts | int:
        with self._trace.phase("rollout"):
            return _columns(
                self._sampler.sample(
                    requests, sampling, ahead, seconds=seconds, resample_unfinished=resample_unfinished
                )
            )

    def continue_sampling(self, ahead: Sequence[RolloutRequest] = (), *, seconds: float = math.inf) -> Rollouts | int:
        with self._trace.phase("rollout"):
            return _columns(self._sampler.continue_sampling(ahead, seconds=seconds))

    def advance(
        self, submitted: Mapping[int, tuple[RolloutRequest, SamplingParams]], seconds: float
    ) -> dict[int, Rollout]:
        return self._sampler.advance(submitted, seconds)


def _columns(answer: list[Rollout] | int) -> Rollouts | int:
    from pipeline.columns import Rollouts

    return answer if isinstance(answer, int) else Rollouts.of(answer)


def update_bytes(update_info: Mapping[str, Any]) -> int:
    """The size of the tensors that vLLM's update announces."""
    import torch

    return sum(
        math.prod(shape) * getattr(torch, dtype).itemsize
        for shape, dtype in zip(update_info["shapes"], update_info["dtype_names"], strict=True)
    )
