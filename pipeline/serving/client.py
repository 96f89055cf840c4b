"""The scoring service from Python, without torch or ray: `VRMScorer`, and `AsyncVRMScorer` for asyncio.

    with VRMScorer("http://127.0.0.1:8000", token="...") as scorer:
        answer = scorer.score("Why is the sky blue?", ["Rayleigh scattering.", "Because."])
        answer.scores[0].reward, answer.scores[0].reward_std, answer.scores[0].contributions

Scoring is a pure function, so a request that failed on its way is sent again until the deadline. Both clients share
their calls and one exchange: a generator that says what to send and how long to wait. They differ only in how they send
and wait.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Generic, TypedDict, TypeVar, Unpack

import httpx
from pydantic import ValidationError

from pipeline.errors import ConfigError, DataError, DeadlineExceeded, WorkerDied, WorkerError
from pipeline.records import Message, RewardScore
from pipeline.serving.protocol import (
    TOKEN_VARIABLE,
    BestOfAnswer,
    CompareAnswer,
    ExplainedReward,
    ModelDescription,
    ScoreAnswer,
    ScoreManyAnswer,
    ServiceAnswer,
)

PromptInput = str | Sequence[Message]
"""The text of one user, or every turn before the response of the assistant."""

PATIENCE_S = 60.0
"""How long a client tries a service that it cannot reach, or that fails. Ray Serve replaces a dead HTTP proxy within
40 s, and a dead replica sooner. A busy service is tried until the deadline."""

BUSY = {429, 503}
"""HTTP statuses of a service that works and takes no more at present."""
FAILED = {500, 502, 504}
"""HTTP statuses of a service that fails."""

SWAP_PAUSE_S = 0.5
"""How long a call that saw two models waits before it scores everything again."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
CONNECTION_TIMEOUT_S = 10.0
"""How long a connection to the service may take."""

BATCH_BYTES = 4 * 2**20
"""The size of a request's texts, at most: half of what a service takes by default."""

AnswerType = TypeVar("AnswerType", bound=ServiceAnswer)


@dataclass(frozen=True)
class Send:
    """Send the request, and wait no longer than this for its answer."""

    timeout_s: float


@dataclass(frozen=True)
class Pause:
    """Do nothing for a while."""

    seconds: float


HttpOutcome = httpx.Response | httpx.TransportError | None
"""The result of a step; None after a pause, and before the first step."""

Result = TypeVar("Result")
Steps = Generator[Send | Pause, HttpOutcome, Result]
"""A generator that yields steps, is sent their outcomes and returns a result."""


def exchange(
    url: str,
    deadline_s: float,
    *,
    ends_at: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    uniform: Callable[[float, float], float] = random.uniform,
) -> Steps[httpx.Response]:
    """Sends one request until it is answered: yields the next step, is sent its outcome, returns the answer.

    The longest pause doubles each time, and each pause is drawn uniformly between 0 and its longest ("full jitter"). So
    workers that failed together do not come back together. After 429 or 503 the time of Retry-After comes first.

    Args:
        deadline_s: seconds for this request, or for all requests that share `ends_at`.
        ends_at: the deadline on the clock; None is `deadline_s` from now.

    Raises:
        ConfigError: the token is wrong, or no request can be made with this token and URL.
        DataError: the service refuses the request.
        WorkerDied: the service could not be reached for `PATIENCE_S`.
        WorkerError: the service failed for `PATIENCE_S`.
        DeadlineExceeded: no answer after `deadline_s`.
    """
    ends_at = clock() + deadline_s if ends_at is None else ends_at
    pause_s, problem = FIRST_PAUSE_S, "no question: those before it took the time"
    failing_since: float | None = None
    while (left := ends_at - clock()) > 0:
        outcome = yield Send(left)
        answer = outcome if isinstance(outcome, httpx.Response) else None
        if answer is not None and answer.is_success:
            return answer
        problem = _problem(url, outcome)
        if answer is not None and answer.status_code in BUSY:
            failing_since = None
        elif failing_since is None:
            failing_since = clock()
        elif clock() - failing_since >= PATIENCE_S:
            kind = WorkerDied if answer is None else WorkerError
            raise kind(f"{url} failed for {PATIENCE_S:g} s, at last with {problem}. Is the service running there?")
        wait_s = (0.0 if answer is None else _retry_after_s(answer)) + uniform(0.0, pause_s)
        if clock() + wait_s >= ends_at:
            break
        yield Pause(wait_s)
        pause_s = min(2.0 * pause_s, LONGEST_PAUSE_S)
    raise DeadlineExceeded(
        f"{url} did not answer within {deadline_s:g} s, at last with {problem}. Ask for less at once, "
        "serve with more replicas (cluster.scoring.replicas), or raise deadline_s (cluster.deadlines.score_s)."
    )


def _problem(url: str, outcome: HttpOutcome) -> str:
    """Why there is no answer, in words.

    Raises:
        ConfigError, DataError: another attempt would fail in the same way.
    """
    if isinstance(outcome, httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        raise ConfigError(
            f"{url} cannot be asked ({outcome}). A URL is http://host:port or https://..., a token one line."
        )
    if not isinstance(outcome, httpx.Response):
        return repr(outcome)
    problem = f"{outcome.status_code}: {_detail(outcome)}"
    if outcome.status_code in {401, 403}:
        raise ConfigError(f"{url} refuses the token ({problem}). Pass token=..., or set {TOKEN_VARIABLE}.")
    if outcome.status_code not in BUSY | FAILED and not _is_proxy_without_routes(outcome):
        raise DataError(f"{url} refuses the request ({problem})")
    return problem


def _is_proxy_without_routes(response: httpx.Response) -> bool:
    """Whether Ray Serve's proxy answered, not the service: one that has just restarted does not know its routes yet."""
    return response.status_code == 404 and "/-/routes" in response.text


class ClientOptions(TypedDict, total=False):
    """Options of both clients, beside the URL of the service."""

    token: str | None
    """The service's bearer token; by default that of VRM_SERVICE_TOKEN."""
    deadline_s: float
    """How long a call may take, over all its requests and retries; 600 by default."""
    batch_size: int
    """Responses per request; 64 by default."""
    concurrency: int
    """Requests in flight at once; 4 by default."""


@dataclass(frozen=True)
class ClientSettings:
    """The state of both clients, and all that is pickled of one."""

    url: str
    token: str | None = None
    deadline_s: float = 600.0
    batch_size: int = 64
    concurrency: int = 4

    @classmethod
    def of(cls, url: str, options: ClientOptions) -> ClientSettings:
        settings = cls(url.rstrip("/"), **options)
        return settings if settings.token is not None else replace(settings, token=os.environ.get(TOKEN_VARIABLE))

    def httpx_options(self) -> dict[str, Any]:
        """The arguments of httpx's clients."""
        headers = {} if self.token is None else {"authorization": f"Bearer {self.token}"}
        return {"base_url": self.url, "headers": headers, "limits": httpx.Limits(max_connections=self.concurrency)}


@dataclass(frozen=True)
class ApiCall(Generic[AnswerType]):
    """One request to the service, and the type of its answer."""

    method: str
    path: str
    kind: type[AnswerType]
    body: Any = None

    def steps(self, settings: ClientSettings, ends_at: float | None) -> Steps[AnswerType]:
        """An exchange that returns the parsed answer."""
        response = yield from exchange(f"{settings.url}{self.path}", settings.deadline_s, ends_at=ends_at)
        return _parse(response, self.kind, settings.url)

    def httpx_request(self, step: Send) -> dict[str, Any]:
        """The arguments of httpx's `request`."""
        timeout = httpx.Timeout(step.timeout_s, connect=min(step.timeout_s, CONNECTION_TIMEOUT_S))
        return {"method": self.method, "url": self.path, "json": self.body, "timeout": timeout}


def compare_call(prompt: PromptInput, a: str, b: str) -> ApiCall[CompareAnswer]:
    return ApiCall("POST", "/v1/compare", CompareAnswer, {"prompt": _json_of(prompt), "a": a, "b": b})


def best_of_call(prompt: PromptInput, responses: Sequence[str], lcb: float) -> ApiCall[BestOfAnswer]:
    body = {"prompt": _json_of(prompt), "responses": list(responses), "lcb": lcb}
    return ApiCall("POST", "/v1/best_of", BestOfAnswer, body)


MODEL_CALL = ApiCall("GET", "/v1/model", ModelDescription)


class VRMScorer:
    """Blocking client. Many threads may share one. It can be pickled; the copy opens its own connections."""

    def __init__(
        self, url: str, *, transport: httpx.BaseTransport | None = None, **options: Unpack[ClientOptions]
    ) -> None:
        self._settings = ClientSettings.of(url, options)
        self._client = httpx.Client(transport=transport, **self._settings.httpx_options())

    def score(
        self, prompt: PromptInput, responses: Sequence[str], *, weights: Mapping[str, float] | None = None
    ) -> ScoreAnswer:
        """The responses to one prompt, in order; `weights` as in `score_rows`."""
        return self.score_rows([prompt] * len(responses), responses, weights=weights)

    def score_rows(
        self,
        prompts: Sequence[PromptInput],
        responses: Sequence[str],
        *,
        weights: Mapping[str, float] | None = None,
    ) -> ScoreAnswer:
        """One score per (prompt, response), in order, in as many requests as needed.

        Args:
            weights: objective -> factor of its weight, as in {"safety": 2}; 1 for the others.

        Raises:
            DataError: not one prompt per response, none at all, or the service refuses them.
            ConfigError, WorkerError, DeadlineExceeded: as `exchange`.
        """
        calls = plan_calls(prompts, responses, self._settings.batch_size, weights)
        ends_at = time.monotonic() + self._settings.deadline_s
        if len(calls) == 1:
            return merge([self._send(calls[0])])
        with ThreadPoolExecutor(self._settings.concurrency) as threads:
            while True:
                # All requests share the deadline and the connections of this client, whichever thread sends them.
                futures = [threads.submit(self._send, call, ends_at) for call in calls]
                try:
                    answers = [future.result() for future in futures]
                except BaseException:
                    for future in futures:
                        future.cancel()
                    raise
                if come_from_one_model(answers):
                    return merge(answers)
                time.sleep(min(SWAP_PAUSE_S, max(0.0, ends_at - time.monotonic())))

    def compare(self, prompt: PromptInput, a: str, b: str) -> CompareAnswer:
        """P(a > b), and what each objective contributes to it."""
        return self._send(compare_call(prompt, a, b))

    def best_of(self, prompt: PromptInput, responses: Sequence[str], *, lcb: float = 0.0) -> BestOfAnswer:
        """The responses from best to worst by reward - lcb * reward_std."""
        return self._send(best_of_call(prompt, responses, lcb))

    def model(self) -> ModelDescription:
        """The model behind the service."""
        return self._send(MODEL_CALL)

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> VRMScorer:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __getstate__(self) -> ClientSettings:
        return self._settings

    def __setstate__(self, settings: ClientSettings) -> None:
        self._settings = settings
        self._client = httpx.Client(**settings.httpx_options())

    def _send(self, call: ApiCall[AnswerType], ends_at: float | None = None) -> AnswerType:
        steps = call.steps(self._settings, ends_at)
        outcome: HttpOutcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as answered:
                return answered.value
            if isinstance(step, Pause):
                time.sleep(step.seconds)
                outcome = None
                continue
            try:
                outcome = self._client.request(**call.httpx_request(step))
            except httpx.TransportError as error:
                outcome = error


class AsyncVRMScorer:
    """The same client for asyncio: methods, results and errors are those of `VRMScorer`."""

    def __init__(
        self, url: str, *, transport: httpx.AsyncBaseTransport | None = None, **options: Unpack[ClientOptions]
    ) -> None:
        self._settings = ClientSettings.of(url, options)
        self._client = httpx.AsyncClient(transport=transport, **self._settings.httpx_options())

    async def score(
        self, prompt: PromptInput, responses: Sequence[str], *, weights: Mapping[str, float] | None = None
    ) -> ScoreAnswer:
        return await self.score_rows([prompt] * len(responses), responses, weights=weights)

    async def score_rows(
        self,
        prompts: Sequence[PromptInput],
        responses: Sequence[str],
        *,
        weights: Mapping[str, float] | None = None,
    ) -> ScoreAnswer:
        calls = plan_calls(prompts, responses, self._settings.batch_size, weights)
        ends_at = time.monotonic() + self._settings.deadline_s
        slots = asyncio.Semaphore(self._settings.concurrency)

        async def send(call: ApiCall[ScoreManyAnswer]) -> ScoreManyAnswer:
            async with slots:
                return await self._send(call, ends_at)

        while True:
            tasks = [asyncio.ensure_future(send(call)) for call in calls]
            try:
                answers = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
            if come_from_one_model(answers):
                return merge(answers)
            await asyncio.sleep(min(SWAP_PAUSE_S, max(0.0, ends_at - time.monotonic())))

    async def compare(self, prompt: PromptInput, a: str, b: str) -> CompareAnswer:
        return await self._send(compare_call(prompt, a, b))

    async def best_of(self, prompt: PromptInput, responses: Sequence[str], *, lcb: float = 0.0) -> BestOfAnswer:
        return await self._send(best_of_call(prompt, responses, lcb))

    async def model(self) -> ModelDescription:
        return await self._send(MODEL_CALL)

    async def close(self) -> None:
        await self._client.aclose()

    async def __aenter__(self) -> AsyncVRMScorer:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.close()

    async def _send(self, call: ApiCall[AnswerType], ends_at: float | None = None) -> AnswerType:
        steps = call.steps(self._settings, ends_at)
        outcome: HttpOutcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as answered:
                return answered.value
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
                outcome = None
                continue
            try:
                outcome = await self._client.request(**call.httpx_request(step))
            except httpx.TransportError as error:
                outcome = error


def plan_calls(
    prompts: Sequence[PromptInput],
    responses: Sequence[str],
    batch_size: int,
    weights: Mapping[str, float] | None = None,
) -> list[ApiCall[ScoreManyAnswer]]:
    """Calls of `POST /v1/score`, of at most `batch_size` responses and about `BATCH_BYTES` each, in order.

    Neighbours with the same prompt share it.

    Raises:
        DataError: not one prompt per response, or none at all.
    """
    if len(prompts) != len(responses) or not responses:
        raise DataError(
            f"{len(prompts)} prompts and {len(responses)} responses to score: one prompt per response, please"
        )
    rows = [(_json_of(prompt), response) for prompt, response in zip(prompts, responses, strict=True)]
    steering = {"weights": dict(weights)} if weights else {}
    bodies = [
        {
            "items": [
                {"prompt": prompt, "responses": [response for _, response in group], **steering}
                for prompt, group in groupby(batch, key=lambda row: row[0])
            ]
        }
        for batch in _batches(rows, batch_size)
    ]
    return [ApiCall("POST", "/v1/score", ScoreManyAnswer, body) for body in bodies]


def come_from_one_model(answers: Sequence[ServiceAnswer]) -> bool:
    """Whether one model gave all answers. Scores of two models cannot be compared: a client then scores again."""
    return len({answer.model_fingerprint for answer in answers}) == 1


def merge(answers: Sequence[ScoreManyAnswer]) -> ScoreAnswer:
    """The scores of all answers, which come from one model, in order."""
    scores = [score for answer in answers for item in answer.items for score in item]
    return ScoreAnswer(model_fingerprint=answers[0].model_fingerprint, scores=scores)


def as_reward_score(scored: ExplainedReward) -> RewardScore:
    """The model's score, from the form in which the service sends it."""
    return RewardScore(
        mean=scored.reward,
        std=scored.reward_std,
        objective_weights=tuple(scored.objective_weights.values()),
        objective_scores=tuple(scored.objective_scores.values()),
        concentration=scored.concentration,
        deviations=tuple(scored.deviations),
        temperature=scored.temperature,
    )


def _batches(rows: Sequence[tuple[Any, str]], batch_size: int) -> Iterator[list[tuple[Any, str]]]:
    batch: list[tuple[Any, str]] = []
    size = 0
    for prompt, response in rows:
        added = len(str(prompt).encode(errors="replace")) + len(response.encode(errors="replace"))
        if batch and (len(batch) == batch_size or size + added > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append((prompt, response))
        size += added
    yield batch


def _json_of(prompt: PromptInput) -> str | list[dict[str, str]]:
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])[:500]
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


def _retry_after_s(response: httpx.Response) -> float:
    seconds = response.headers.get("retry-after", "")
    return float(seconds) if seconds.isdigit() else 0.0  # the other form, a date, would need two clocks that agree


def _parse(response: httpx.Response, kind: type[AnswerType], url: str) -> AnswerType:
    try:
        return kind.model_validate_json(response.content)
    except ValidationError as error:
        raise WorkerError(f"{url} is no VRM scoring service, or another version of it: {error}") from error
