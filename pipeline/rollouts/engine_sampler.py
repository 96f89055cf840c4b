"""The requests of one engine: sampled for a call, sampled ahead of one, interrupted by new weights, and resumed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Protocol

from pipeline.data.batching import stable_seed
from pipeline.errors import StaleEngineError
from pipeline.records import FinishReason, Rollout, SamplingParams
from pipeline.rollouts.requests import RolloutRequest

ResponseKey = tuple[tuple[int, ...], int, SamplingParams]
"""What decides a response: prompt tokens, seed and sampling parameters."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What an engine returns for one request."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Log-probabilities in the distribution that was sampled from: temperature applied."""
    finish_reason: FinishReason


class SamplingEngine(Protocol):
    """What the sampler asks of an engine. The sampler chooses the numbers of the requests."""

    def submit(self, number: int, prompt: tuple[int, ...], seed: int, sampling: SamplingParams) -> None:
        """Queues one request."""

    def step(self) -> dict[int, Sample]:
        """Decodes one token of as many requests as there is room for. Returns what finished, by number."""

    @property
    def is_busy(self) -> bool:
        """Whether some request has no response yet."""

    def abort(self, numbers: Sequence[int]) -> dict[int, Sample]:
        """Forgets these requests. Returns the others that finished meanwhile, by number."""

    def interrupt(self) -> dict[int, Sample]:
        """Forgets all requests. Returns the tokens they have so far, by number."""


@dataclass(frozen=True, kw_only=True)
class OpenRequest:
    """A request without a rollout yet, and the tokens it has from policies before the present one."""

    request: RolloutRequest
    sampling: SamplingParams
    version: int
    """Version of the policy that sampled the first token."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


class EngineSampler:
    """Turns rollout requests into rollouts with one engine, across changes of the policy.

    A caller uses it in one of two ways: `sample` and `continue_sampling` answer whole lists of requests, `advance`
    returns each rollout of a stream as it finishes.
    """

    def __init__(self, engine: SamplingEngine, decode: Callable[[tuple[int, ...]], str], *, name: str) -> None:
        """
        Args:
            decode: response tokens -> text.
            name: names the engine in messages.
        """
        self._engine = engine
        self._decode = decode
        self._name = name
        self._version: int | None = None
        self._numbers = count()
        self._open: dict[int, OpenRequest] = {}
        """Every request without a rollout, by its number in the engine."""
        self._finished: dict[int, Sample] = {}
        """Samples of open requests that the engine has finished, by the same number."""
        self._is_interrupted = False
        """New weights came, and no call since then has decided whether the open requests are resumed."""
        self._requested: list[int] = []
        """Numbers of the requests that the present call of `sample` waits for."""
        self._ahead: dict[ResponseKey, int] = {}
        """Numbers of the requests that were submitted before a call waits for them."""
        self._sampling: SamplingParams | None = None
        """Of the present call, and so of what is submitted ahead of the next."""
        self._stream_numbers: dict[int, int] = {}
        """The caller's number of a streamed request, by the engine's number."""

    def interrupt(self) -> None:
        """Takes the policy away. Open requests leave the engine and keep the tokens they have."""
        self._version = None
        # Weights are loaded between streams, so nobody reads what an earlier stream left open.
        self._drop([*self._stream_numbers])
        for number, sample in self._engine.interrupt().items():
            interrupted = self._open[number]
            self._open[number] = replace(
                interrupted,
                token_ids=interrupted.token_ids + sample.token_ids,
                logprobs=interrupted.logprobs + sample.logprobs,
            )
        self._is_interrupted = True

    def accept_policy(self, version: int) -> None:
        """Samples from now on with the policy of this version, which is in the engine and has passed the gate."""
        self._version = version

    def sample(
        self,
        requests: Sequence[RolloutRequest],
        sampling: SamplingParams,
        ahead: Sequence[RolloutRequest] = (),
        *,
        seconds: float = math.inf,
        resample_unfinished: bool = False,
    ) -> list[Rollout] | int:
        """One rollout per request, in order; if they take longer than about `seconds`, what the engine still has.

        That is the number of requests without a response, those ahead included. `continue_sampling` then returns the
        rollouts.

        Args:
            ahead: requests of the next calls, probably. The engine starts them as it has room, instead of decoding
                fewer and fewer responses at a time until the last of `requests` has ended. Those that an earlier call
                gave ahead and this one does not name are forgotten.
            resample_unfinished: requests that were submitted ahead of the newest weights start again with them.

        Raises:
            StaleEngineError: no policy has been accepted since `interrupt`.
        """
        self._require_policy()
        reusable = {} if self._is_interrupted and resample_unfinished else self._ahead
        numbers = [reusable.pop(_response_key(request, sampling), None) for request in requests]
        begun = {key: reusable[key] for request in ahead if (key := _response_key(request, sampling)) in reusable}
        # Whatever else is open belongs to another worker by now, or to no caller.
        self._drop(sorted(self._open.keys() - {*numbers} - {*begun.values()}))
        self._resume_interrupted()
        self._sampling = sampling
        self._requested = [
            self._submit(request, sampling) if number is None else number
            for number, request in zip(numbers, requests, strict=True)
        ]
        self._ahead = begun
        self._submit_ahead(ahead, sampling)
        return self._wait_for_requested(seconds)

    def continue_sampling(
        self, ahead: Sequence[RolloutRequest] = (), *, seconds: float = math.inf
    ) -> list[Rollout] | int:
        """The rollouts that `sample` did not finish, or a number, as there.

        If weights came in between, the present policy continues each response after its last token.

        Args:
            ahead: more requests of the next calls, for an engine that soon has room.

        Raises:
            StaleEngineError: as `sample`.
        """
        self._require_policy()
        self._resume_interrupted()
        assert self._sampling is not None, "continue_sampling was called before sample"
        self._submit_ahead(ahead, self._sampling)
        return self._wait_for_requested(seconds)

    def advance(
        self, submitted: Mapping[int, tuple[RolloutRequest, SamplingParams]], seconds: float
    ) -> dict[int, Rollout]:
        """Adds requests to those in the engine and decodes for about `seconds`. Returns what finished, by number.

        Raises:
            StaleEngineError: as `sample`.
        """
        self._require_policy()
        for caller_number, (request, sampling) in submitted.items():
            self._stream_numbers[self._submit(request, sampling)] = caller_number
        end = time.monotonic() + seconds
        while self._engine.is_busy and time.monotonic() < end:
            self._finished |= self._engine.step()
        return {
            self._stream_numbers.pop(number): self._take_rollout(number)
            for number in self._finished.keys() & self._stream_numbers.keys()
        }

    def _submit_ahead(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> None:
        for request in requests:
            key = _response_key(request, sampling)
            if key not in self._ahead:
                self._ahead[key] = self._submit(request, sampling)

    def _wait_for_requested(self, seconds: float) -> list[Rollout] | int:
        end = time.monotonic() + seconds
        while not self._finished.keys() >= {*self._requested}:
            if time.monotonic() >= end:
                return len(self._open.keys() - self._finished.keys())
            self._finished |= self._engine.step()
        return [self._take_rollout(number) for number in self._requested]

    def _submit(self, request: RolloutRequest, sampling: SamplingParams) -> int:
        number = next(self._numbers)
        self._engine.submit(number, request.prompt.token_ids, request.seed, sampling)
        self._open[number] = OpenRequest(request=request, sampling=sampling, version=self._require_policy())
        return number

    def _resume_interrupted(self) -> None:
        if self._is_interrupted:
            for number in sorted(self._open.keys() - self._finished.keys()):
                self._resume(number)
            self._is_interrupted = False

    def _resume(self, number: int) -> None:
        """Submits the rest of an interrupted response; its first tokens are now a part of the prompt."""
        interrupted = self._open[number]
        if not interrupted.token_ids:
            interrupted = self._open[number] = replace(interrupted, version=self._require_policy())
        request, sampling, num_tokens = interrupted.request, interrupted.sampling, len(interrupted.token_ids)
        self._engine.submit(
            number,
            (*request.prompt.token_ids, *interrupted.token_ids),
            # A new generator of the same seed would draw the numbers of the first tokens again.
            request.seed if num_tokens == 0 else stable_seed("resumed", request.seed, num_tokens),
            replace(sampling, max_response_tokens=sampling.max_response_tokens - num_tokens),
        )

    def _drop(self, numbers: Sequence[int]) -> None:
        """Forgets requests that no caller wants any more."""
        if numbers:
            self._finished |= self._engine.abort(numbers)
        for number in numbers:
            del self._open[number]
            self._finished.pop(number, None)
            self._stream_numbers.pop(number, None)

    def _require_policy(self) -> int:
        """The version of the accepted policy."""
        if self._version is None:
            raise StaleEngineError(f"{self._name} was asked to sample before it passed the numerics gate.")
        return self._version

    def _take_rollout(self, number: int) -> Rollout:
        """The rollout of a finished request, which is then forgotten."""
        finished, sample = self._open.pop(number), self._finished.pop(number)
        token_ids = finished.token_ids + sample.token_ids
        return Rollout(
            prompt=finished.request.prompt,
            sample_index=finished.request.sample_index,
            response_ids=token_ids,
            response_text=self._decode(token_ids),
            logprobs=finished.logprobs + sample.logprobs,
            policy_version=finished.version,
            finish_reason=sample.finish_reason,
        )


def _response_key(request: RolloutRequest, sampling: SamplingParams) -> ResponseKey:
    return request.prompt.token_ids, request.seed, sampling
