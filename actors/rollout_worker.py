"""A rollout worker: one vLLM engine in a Ray actor."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.rollout_plan import RolloutPlan
from pipeline.config.schema import RolloutConfig
from pipeline.data.sampling import RolloutRequest
from pipeline.errors import StaleEngineError
from pipeline.learning.probes import check_engine
from pipeline.records import Metrics, PolicyWeights, Rollout, SamplingParams
from pipeline.stages import storage

if TYPE_CHECKING:
    from actors.vllm_engine import Sample


COPIED_BYTES = 256 * 2**20
"""At most, to measure once how fast the engine's memory is: more than any cache, and a moment's work."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """The last policy's way into the engine."""

    seconds: float
    num_bytes: int


class RolloutWorker:
    """Holds an engine and the tokenizer that turns its samples into text."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._version: int | None = None
        self._copy_gb_per_s: float | None = None
        self._submitted: dict[int, RolloutRequest] = {}

    def start(
        self,
        model_uri: str,
        config: RolloutConfig,
        plan: RolloutPlan,
        dtype: str,
        max_model_len: int,
        seed: int,
    ) -> None:
        """Builds the engine. Not the constructor's work: an error here is a message, there a dead actor."""
        from pipeline.models.backbone import load_tokenizer

        with storage.reading(model_uri) as directory:
            self._tokenizer = load_tokenizer(directory)
            # Second: the tokenizer's module imports transformers the quick way.
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
                seed=seed,
            )

    def sleep(self) -> None:
        """Leaves the GPU to the learner; the next weights wake it."""
        self._version = None
        self._engine.sleep()

    def load_weights(self, weights: PolicyWeights, tolerance: float) -> Metrics:
        """Loads a published policy and passes the gate; until it has, this worker samples nothing."""
        from actors.weight_relay import readable_here

        self._version = None
        started = time.perf_counter()
        weights = readable_here(weights)
        num_bytes = self._engine.load_weights(weights.location)
        self._transfer = Transfer(seconds=time.perf_counter() - started, num_bytes=num_bytes)
        return self.accept_weights(weights, tolerance)

    # What the learner's first rank calls while it sends (`actors/weight_sender.py`).

    def meet_learner(self, init_info: dict[str, Any]) -> None:
        self._engine.meet_learner(init_info)

    def start_update(self) -> None:
        self._version = None
        self._began, self._num_bytes = time.perf_counter(), 0
        self._engine.start_update()

    def receive(self, update_info: dict[str, Any]) -> None:
        self._engine.receive(update_info)
        self._num_bytes += update_bytes(update_info)

    def finish_update(self) -> None:
        self._engine.finish_update()
        self._transfer = Transfer(seconds=time.perf_counter() - self._began, num_bytes=self._num_bytes)

    def accept_weights(self, weights: PolicyWeights, tolerance: float) -> Metrics:
        """The gate for weights that are in the engine, however they came; then this worker samples from them."""
        gate = self.check(weights, tolerance)
        self._version = weights.version
        seconds, num_bytes = self._transfer.seconds, self._transfer.num_bytes
        if self._copy_gb_per_s is None:
            self._copy_gb_per_s = self._engine.copy_gb_per_s(min(num_bytes, COPIED_BYTES))
        return gate | {
            "weights/seconds": seconds,
            "weights/gb_per_s": num_bytes / 1e9 / seconds,
            "weights/copy_gb_per_s": self._copy_gb_per_s,
        }

    def check(self, weights: PolicyWeights, tolerance: float) -> Metrics:
        """The numerics gate alone."""
        from actors.weight_relay import readable_here

        return check_engine(
            weights.probes,
            self._engine.probe_logprobs(weights.probes),
            tolerance=tolerance,
            engine=self._name,
            version=weights.version,
            differing_groups=lambda: self._engine.differing_groups(readable_here(weights).location),
        )

    def sample(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Rollout]:
        """One rollout per request, in order."""
        version = self._checked_version()
        samples = self._engine.sample([r.prompt.token_ids for r in requests], [r.seed for r in requests], sampling)
        return [self._rollout(*answered, version) for answered in zip(requests, samples, strict=True)]

    def advance(
        self, submitted: Mapping[int, tuple[RolloutRequest, SamplingParams]], seconds: float
    ) -> dict[int, Rollout]:
        """Adds requests to those in the engine, decodes for about so long, and returns what finished, by number."""
        version = self._checked_version()
        for number, (request, sampling) in submitted.items():
            self._engine.submit(number, request.prompt.token_ids, request.seed, sampling)
            self._submitted[number] = request
        finished = self._engine.advance(seconds)
        return {
            number: self._rollout(self._submitted.pop(number), sample, version) for number, sample in finished.items()
        }

    def _checked_version(self) -> int:
        if self._version is None:
            raise StaleEngineError(f"{self._name} was asked to sample before it passed the numerics gate.")
        return self._version

    def _rollout(self, request: RolloutRequest, sample: Sample, version: int) -> Rollout:
        from pipeline.data.chat import decode_response

        return Rollout(
            prompt=request.prompt,
            sample_index=request.sample_index,
            response_ids=sample.token_ids,
            response_text=decode_response(self._tokenizer, sample.token_ids),
            logprobs=sample.logprobs,
            policy_version=version,
            finish_reason=sample.finish_reason,
        )


def update_bytes(update_info: Mapping[str, Any]) -> int:
    """Of the tensors that vLLM's update announces."""
    import torch

    return sum(
        math.prod(shape) * getattr(torch, dtype).itemsize
        for shape, dtype in zip(update_info["shapes"], update_info["dtype_names"], strict=True)
    )
