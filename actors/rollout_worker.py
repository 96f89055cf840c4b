"""A rollout worker: one vLLM engine in a Ray actor."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from cluster.engine_build import ResolvedRolloutConfig
from cluster.rollout_plan import RolloutPlan
from pipeline.data.batching import stable_seed
from pipeline.errors import StaleEngineError
from pipeline.records import Metrics, PolicyWeights, Rollout, SamplingParams
from pipeline.rollouts.numerics_gate import check_engine
from pipeline.rollouts.requests import RolloutRequest
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


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A request, and what it has from policies before the one that samples it now."""

    request: RolloutRequest
    sampling: SamplingParams
    version: int
    """Of the policy of its first token."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


class RolloutWorker:
    """Holds an engine and the tokenizer that turns its samples into text."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._version: int | None = None
        self._copy_gb_per_s: float | None = None
        self._numbers = count()
        self._begun: dict[int, Begun] = {}
        """By its number in the engine."""
        self._is_interrupted = False
        """New weights came, and nobody has said yet whether what was begun shall go on."""
        self._finished: dict[int, Sample] = {}
        self._asked: list[int] = []
        """Of the call that is to be answered."""
        self._ahead: dict[tuple[Any, ...], int] = {}
        """Number of a request that was submitted before its turn."""
        self._told: dict[int, int] = {}
        """The caller's number of a request, by the engine's."""

    def start(
        self,
        model_uri: str,
        config: ResolvedRolloutConfig,
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
        self._interrupt()
        self._engine.sleep()

    def load_weights(self, weights: PolicyWeights, tolerance: float) -> Metrics:
        """Loads a published policy and passes the gate; until it has, this worker samples nothing."""
        from actors.weight_relay import readable_here

        self._interrupt()
        started = time.perf_counter()
        weights = readable_here(weights)
        num_bytes = self._engine.load_weights(weights.location)
        self._transfer = Transfer(seconds=time.perf_counter() - started, num_bytes=num_bytes)
        return self.accept_weights(weights, tolerance)

    # What the learner's first rank calls while it sends (`actors/weight_sender.py`).

    def meet_learner(self, init_info: dict[str, Any]) -> None:
        self._engine.meet_learner(init_info)

    def start_update(self) -> None:
        self._interrupt()
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
        from pipeline.learning.memory import resident_peak_gib

        gate = self.check(weights, tolerance)
        self._version = weights.version
        seconds, num_bytes = self._transfer.seconds, self._transfer.num_bytes
        if self._copy_gb_per_s is None:
            self._copy_gb_per_s = self._engine.copy_gb_per_s(min(num_bytes, COPIED_BYTES))
        return gate | {
            "weights/seconds": seconds,
            "weights/gb_per_s": num_bytes / 1e9 / seconds,
            "weights/copy_gb_per_s": self._copy_gb_per_s,
            "memory/rollout_worker_peak_gib": resident_peak_gib(),
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

    def sample(
        self,
        requests: Sequence[RolloutRequest],
        sampling: SamplingParams,
        ahead: Sequence[RolloutRequest] = (),
        *,
        seconds: float = math.inf,
        resample_unfinished: bool = False,
    ) -> list[Rollout] | None:
        """One rollout per request, in order; None where it takes longer than about so long: then ask `go_on`.

        Args:
            ahead: what will probably be asked next. The engine takes it up as it has room, instead of decoding fewer
                and fewer responses at a time until the last of `requests` has ended.
            resample_unfinished: what was begun ahead before new weights came begins anew with them.
        """
        self._checked_version()
        begun = {} if self._is_interrupted and resample_unfinished else self._ahead
        numbers = [begun.pop(_key(request, sampling), None) for request in requests]
        # What another worker was asked for instead, or nobody waits for any more.
        self._drop(sorted(self._begun.keys() - {*numbers}))
        self._resume_interrupted()
        self._asked = [
            self._submit(request, sampling) if number is None else number
            for number, request in zip(numbers, requests, strict=True)
        ]
        self._ahead = {_key(request, sampling): self._submit(request, sampling) for request in ahead}
        return self._answer(seconds)

    def go_on(self, *, seconds: float = math.inf) -> list[Rollout] | None:
        """What `sample` did not finish. If weights came between, the policy of now goes on where that before ended."""
        self._checked_version()
        self._resume_interrupted()
        return self._answer(seconds)

    def _answer(self, seconds: float) -> list[Rollout] | None:
        end = time.monotonic() + seconds
        while not self._finished.keys() >= {*self._asked}:
            if time.monotonic() >= end:
                return None
            self._finished |= self._engine.step()
        return [self._rollout(number) for number in self._asked]

    def advance(
        self, submitted: Mapping[int, tuple[RolloutRequest, SamplingParams]], seconds: float
    ) -> dict[int, Rollout]:
        """Adds requests to those in the engine, decodes for about so long, and returns what finished, by number."""
        self._checked_version()
        self._told |= {self._submit(*asked): number for number, asked in submitted.items()}
        end = time.monotonic() + seconds
        while self._engine.is_busy and time.monotonic() < end:
            self._finished |= self._engine.step()
        return {self._told.pop(number): self._rollout(number) for number in self._finished.keys() & self._told.keys()}

    def _submit(self, request: RolloutRequest, sampling: SamplingParams) -> int:
        number = next(self._numbers)
        self._engine.submit(number, request.prompt.token_ids, request.seed, sampling)
        self._begun[number] = Begun(request=request, sampling=sampling, version=self._checked_version())
        return number

    def _resume_interrupted(self) -> None:
        if self._is_interrupted:
            for number in sorted(self._begun.keys() - self._finished.keys()):
                self._resume(number)
            self._is_interrupted = False

    def _resume(self, number: int) -> None:
        """Submits the rest of an interrupted response; its first tokens are now a part of the prompt."""
        begun = self._begun[number]
        if not begun.token_ids:
            begun = self._begun[number] = replace(begun, version=self._checked_version())
        request, so_far = begun.request, len(begun.token_ids)
        self._engine.submit(
            number,
            (*request.prompt.token_ids, *begun.token_ids),
            # A new generator of the same seed would draw the numbers of the first tokens again.
            request.seed if so_far == 0 else stable_seed("resumed", request.seed, so_far),
            replace(begun.sampling, max_response_tokens=begun.sampling.max_response_tokens - so_far),
        )

    def _drop(self, numbers: Sequence[int]) -> None:
        """Requests that nobody wants any more."""
        if numbers:
            self._finished |= self._engine.abort(numbers)
        for number in numbers:
            del self._begun[number]
            self._finished.pop(number, None)
            self._told.pop(number, None)

    def _interrupt(self) -> None:
        """Takes the policy away, and out of the engine all that was sampled from it."""
        self._version = None
        self._drop([*self._told])
        for number, sample in self._engine.interrupt().items():
            begun = self._begun[number]
            self._begun[number] = replace(
                begun, token_ids=begun.token_ids + sample.token_ids, logprobs=begun.logprobs + sample.logprobs
            )
        self._is_interrupted = True

    def _checked_version(self) -> int:
        if self._version is None:
            raise StaleEngineError(f"{self._name} was asked to sample before it passed the numerics gate.")
        return self._version

    def _rollout(self, number: int) -> Rollout:
        """Of a finished request, which is forgotten."""
        from pipeline.data.chat import decode_response

        begun, sample = self._begun.pop(number), self._finished.pop(number)
        token_ids = begun.token_ids + sample.token_ids
        return Rollout(
            prompt=begun.request.prompt,
            sample_index=begun.request.sample_index,
            response_ids=token_ids,
            response_text=decode_response(self._tokenizer, token_ids),
            logprobs=begun.logprobs + sample.logprobs,
            policy_version=begun.version,
            finish_reason=sample.finish_reason,
        )


def _key(request: RolloutRequest, sampling: SamplingParams) -> tuple[Any, ...]:
    """What decides the response."""
    return request.prompt.token_ids, request.seed, sampling


def update_bytes(update_info: Mapping[str, Any]) -> int:
    """Of the tensors that vLLM's update announces."""
    import torch

    return sum(
        math.prod(shape) * getattr(torch, dtype).itemsize
        for shape, dtype in zip(update_info["shapes"], update_info["dtype_names"], strict=True)
    )
