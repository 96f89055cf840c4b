"""The scoring service from Python, without torch or ray: `VRMScorer`, and `AsyncVRMScorer` for asyncio.

    with VRMScorer("http://127.0.0.1:8000", token="...") as scorer:
        answer = scorer.score("Why is the sky blue?", ["Rayleigh scattering.", "Because."])
        answer.scores[0].reward, answer.scores[0].reward_std, answer.scores[0].contributions

Scoring is a pure function, so whatever fails on the way is simply asked again until the deadline. Both clients share
their questions and one exchange, written as a generator that says what to send and how long to wait; they differ in
how they do so.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Generic, TypedDict, TypeVar, Unpack

import httpx
from pydantic import ValidationError

from pipeline.errors import ConfigError, DataError, DeadlineExceeded, WorkerDied, WorkerError
from pipeline.records import Message
from pipeline.serving.protocol import (
    TOKEN_VARIABLE,
    Answer,
    BestOfAnswer,
    CompareAnswer,
    ModelAnswer,
    ScoreAnswer,
    ScoreManyAnswer,
)

Prompt = str | Sequence[Message]
"""The words of one user, or every turn up to where the assistant speaks."""

PATIENCE_S = 60.0
"""How long a service that cannot be reached, or that fails, is asked: Ray Serve replaces a dead HTTP proxy within 40 s,
a dead replica sooner. A busy one is asked until the deadline."""

BUSY = {429, 503}
FAILED = {500, 502, 504}

SWAP_PAUSE_S = 0.5
"""Between two looks at whether a new model has been rolled in everywhere."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
CONNECT_S = 10.0

BATCH_BYTES = 4 * 2**20
"""Half of what a service takes by default."""

AnswerType = TypeVar("AnswerType", bound=Answer)


@dataclass(frozen=True)
class Send:
    """Send the request, and wait no longer than this for its answer."""

    timeout_s: float


@dataclass(frozen=True)
class Pause:
    """Do nothing for a while."""

    seconds: float


Outcome = httpx.Response | httpx.TransportError | None
"""What came of a step; nothing of a pause, or before the first."""

Result = TypeVar("Result")
Steps = Generator[Send | Pause, Outcome, Result]


def exchange(
    url: str,
    deadline_s: float,
    *,
    ends: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    uniform: Callable[[float, float], float] = random.uniform,
) -> Steps[httpx.Response]:
    """One question, asked until it is answered: yields what to do next, is sent what came of it, returns the answer.

    Pauses double, and each is drawn uniformly between nothing and its length ("full jitter"), so that workers which
    failed together do not come back together; after 429 or 503, Retry-After is waited out first.

    Args:
        deadline_s: for this question, or for all that share an end.
        ends: on the clock; None is `deadline_s` from now.

    Raises:
        ConfigError: the token is wrong, or no request can be made with this token and URL.
        DataError: the service refuses the question.
        WorkerDied: it could not be reached for `PATIENCE_S`.
        WorkerError: it failed for as long.
        DeadlineExceeded: no answer after `deadline_s`.
    """
    ends = clock() + deadline_s if ends is None else ends
    pause_s, trouble = FIRST_PAUSE_S, "no question: those before it took the time"
    failing_since: float | None = None
    while (left := ends - clock()) > 0:
        outcome = yield Send(left)
        if isinstance(outcome, httpx.Response) and outcome.is_success:
            return outcome
        trouble = _trouble_worth_retrying(url, outcome)
        if isinstance(outcome, httpx.Response) and outcome.status_code in BUSY:
            failing_since = None
        elif failing_since is None:
            failing_since = clock()
        elif clock() - failing_since >= PATIENCE_S:
            kind = WorkerError if isinstance(outcome, httpx.Response) else WorkerDied
            raise kind(f"{url} failed for {PATIENCE_S:g} s, at last with {trouble}. Is the service running there?")
        wait_s = _retry_after_s(outcome) + uniform(0.0, pause_s)
        if clock() + wait_s >= ends:
            break
        yield Pause(wait_s)
        pause_s = min(2.0 * pause_s, LONGEST_PAUSE_S)
    raise DeadlineExceeded(
        f"{url} did not answer within {deadline_s:g} s, at last with {trouble}. Ask for less at once, "
        "serve with more replicas (cluster.scoring.replicas), or raise deadline_s (cluster.deadlines.score_s)."
    )


class Options(TypedDict, total=False):
    """Of both clients, beside the URL of the service."""

    token: str | None
    """Its bearer token; by default that of VRM_SERVICE_TOKEN."""
    deadline_s: float
    """How long a call may take, over all its requests and retries; 600 by default."""
    batch_size: int
    """Responses per request; 64 by default."""
    concurrency: int
    """Requests in flight at once; 4 by default."""


@dataclass(frozen=True)
class Settings:
    """What both clients are made of, and all that is left of one that was pickled."""

    url: str
    token: str | None = None
    deadline_s: float = 600.0
    batch_size: int = 64
    concurrency: int = 4

    @classmethod
    def of(cls, url: str, options: Options) -> Settings:
        settings = cls(url.rstrip("/"), **options)
        return settings if settings.token is not None else replace(settings, token=os.environ.get(TOKEN_VARIABLE))

    def client_options(self) -> dict[str, Any]:
        headers = {} if self.token is None else {"authorization": f"Bearer {self.token}"}
        return {"base_url": self.url, "headers": headers, "limits": httpx.Limits(max_connections=self.concurrency)}


@dataclass(frozen=True)
class Question(Generic[AnswerType]):
    """One request, and what its answer is."""

    method: str
    path: str
    kind: type[AnswerType]
    body: Any = None

    def steps(self, settings: Settings, ends: float | None) -> Steps[AnswerType]:
        """An exchange that returns the answer itself."""
        response = yield from exchange(f"{settings.url}{self.path}", settings.deadline_s, ends=ends)
        return _parse(response, self.kind, settings.url)

    def request(self, step: Send) -> dict[str, Any]:
        """The arguments of httpx's `request`."""
        timeout = httpx.Timeout(step.timeout_s, connect=min(step.timeout_s, CONNECT_S))
        return {"method": self.method, "url": self.path, "json": self.body, "timeout": timeout}


def comparison(prompt: Prompt, a: str, b: str) -> Question[CompareAnswer]:
    return Question("POST", "/v1/compare", CompareAnswer, {"prompt": _json_of(prompt), "a": a, "b": b})


def choice(prompt: Prompt, responses: Sequence[str], lcb: float) -> Question[BestOfAnswer]:
    body = {"prompt": _json_of(prompt), "responses": list(responses), "lcb": lcb}
    return Question("POST", "/v1/best_of", BestOfAnswer, body)


INTRODUCTION = Question("GET", "/v1/model", ModelAnswer)


class VRMScorer:
    """Blocking client; many threads may share one. It can be pickled; its connections stay behind."""

    def __init__(self, url: str, *, transport: httpx.BaseTransport | None = None, **options: Unpack[Options]) -> None:
        self._settings = Settings.of(url, options)
        self._client = httpx.Client(transport=transport, **self._settings.client_options())

    def score(self, prompt: Prompt, responses: Sequence[str]) -> ScoreAnswer:
        """The responses to one prompt, in order."""
        return self.score_rows([prompt] * len(responses), responses)

    def score_rows(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> ScoreAnswer:
        """One score per (prompt, response), in order, in as many requests as it takes.

        Raises:
            DataError: not one prompt per response, none at all, or what the service refuses.
            ConfigError, WorkerError, DeadlineExceeded: as `exchange`.
        """
        questions = plan_requests(prompts, responses, self._settings.batch_size)
        ends = time.monotonic() + self._settings.deadline_s
        if len(questions) == 1:
            return merge([self._ask(questions[0])])
        with ThreadPoolExecutor(self._settings.concurrency) as threads:
            while True:
                calls = [threads.submit(self._ask, question, ends) for question in questions]
                try:
                    answers = [call.result() for call in calls]
                except BaseException:
                    for call in calls:
                        call.cancel()
                    raise
                if agree(answers):
                    return merge(answers)
                time.sleep(min(SWAP_PAUSE_S, max(0.0, ends - time.monotonic())))

    def compare(self, prompt: Prompt, a: str, b: str) -> CompareAnswer:
        """P(a > b), and because of what."""
        return self._ask(comparison(prompt, a, b))

    def best_of(self, prompt: Prompt, responses: Sequence[str], *, lcb: float = 0.0) -> BestOfAnswer:
        """The candidates from best to worst by reward - lcb * reward_std."""
        return self._ask(choice(prompt, responses, lcb))

    def model(self) -> ModelAnswer:
        """The model behind the service."""
        return self._ask(INTRODUCTION)

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> VRMScorer:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __getstate__(self) -> Settings:
        return self._settings

    def __setstate__(self, settings: Settings) -> None:
        self._settings = settings
        self._client = httpx.Client(**settings.client_options())

    def _ask(self, question: Question[AnswerType], ends: float | None = None) -> AnswerType:
        steps = question.steps(self._settings, ends)
        outcome: Outcome = None
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
                outcome = self._client.request(**question.request(step))
            except httpx.TransportError as error:
                outcome = error


class AsyncVRMScorer:
    """The same for asyncio."""

    def __init__(
        self, url: str, *, transport: httpx.AsyncBaseTransport | None = None, **options: Unpack[Options]
    ) -> None:
        self._settings = Settings.of(url, options)
        self._client = httpx.AsyncClient(transport=transport, **self._settings.client_options())

    async def score(self, prompt: Prompt, responses: Sequence[str]) -> ScoreAnswer:
        return await self.score_rows([prompt] * len(responses), responses)

    async def score_rows(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> ScoreAnswer:
        questions = plan_requests(prompts, responses, self._settings.batch_size)
        ends = time.monotonic() + self._settings.deadline_s
        room = asyncio.Semaphore(self._settings.concurrency)

        async def ask(question: Question[ScoreManyAnswer]) -> ScoreManyAnswer:
            async with room:
                return await self._ask(question, ends)

        while True:
            calls = [asyncio.ensure_future(ask(question)) for question in questions]
            try:
                answers = await asyncio.gather(*calls)
            finally:
                for call in calls:
                    call.cancel()
            if agree(answers):
                return merge(answers)
            await asyncio.sleep(min(SWAP_PAUSE_S, max(0.0, ends - time.monotonic())))

    async def compare(self, prompt: Prompt, a: str, b: str) -> CompareAnswer:
        return await self._ask(comparison(prompt, a, b))

    async def best_of(self, prompt: Prompt, responses: Sequence[str], *, lcb: float = 0.0) -> BestOfAnswer:
        return await self._ask(choice(prompt, responses, lcb))

    async def model(self) -> ModelAnswer:
        return await self._ask(INTRODUCTION)

    async def close(self) -> None:
        await self._client.aclose()

    async def __aenter__(self) -> AsyncVRMScorer:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.close()

    async def _ask(self, question: Question[AnswerType], ends: float | None = None) -> AnswerType:
        steps = question.steps(self._settings, ends)
        outcome: Outcome = None
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
                outcome = await self._client.request(**question.request(step))
            except httpx.TransportError as error:
                outcome = error


def plan_requests(
    prompts: Sequence[Prompt], responses: Sequence[str], batch_size: int
) -> list[Question[ScoreManyAnswer]]:
    """Questions to `POST /v1/score`, of at most `batch_size` responses and about `BATCH_BYTES` each, in order.

    Neighbours with the same prompt share it.

    Raises:
        DataError: not one prompt per response, or none at all.
    """
    if len(prompts) != len(responses) or not responses:
        raise DataError(
            f"{len(prompts)} prompts and {len(responses)} responses to score: one prompt per response, please"
        )
    rows = [(_json_of(prompt), response) for prompt, response in zip(prompts, responses, strict=True)]
    bodies = [
        {
            "items": [
                {"prompt": prompt, "responses": [response for _, response in group]}
                for prompt, group in groupby(batch, key=lambda row: row[0])
            ]
        }
        for batch in _batches(rows, batch_size)
    ]
    return [Question("POST", "/v1/score", ScoreManyAnswer, body) for body in bodies]


def agree(answers: Sequence[Answer]) -> bool:
    """Whether one model gave them all. Scores of two cannot be compared, so a call that saw a swap asks again."""
    return len({answer.model_fingerprint for answer in answers}) == 1


def merge(answers: Sequence[ScoreManyAnswer]) -> ScoreAnswer:
    """The scores of a call's requests, in order; they `agree`."""
    scores = [score for answer in answers for item in answer.items for score in item]
    return ScoreAnswer(model_fingerprint=answers[0].model_fingerprint, scores=scores)


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


def _json_of(prompt: Prompt) -> str | list[dict[str, str]]:
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]


def _trouble_worth_retrying(url: str, outcome: Outcome) -> str:
    """What went wrong with a request, in words.

    Raises:
        ConfigError, DataError: the same request would fail again.
    """
    if isinstance(outcome, httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        raise ConfigError(
            f"{url} cannot be asked ({outcome}). A URL is http://host:port or https://..., a token one line."
        )
    if not isinstance(outcome, httpx.Response):
        return repr(outcome)
    trouble = f"{outcome.status_code}: {_detail(outcome)}"
    if outcome.status_code in {401, 403}:
        raise ConfigError(f"{url} refuses the token ({trouble}). Pass token=..., or set {TOKEN_VARIABLE}.")
    if outcome.status_code not in BUSY | FAILED:
        raise DataError(f"{url} refuses the request ({trouble})")
    return trouble


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])[:500]
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


def _retry_after_s(outcome: Outcome) -> float:
    if not isinstance(outcome, httpx.Response):
        return 0.0
    given = outcome.headers.get("retry-after", "")
    return float(given) if given.isdigit() else 0.0  # the other form, a date, would need clocks that agree


def _parse(response: httpx.Response, kind: type[AnswerType], url: str) -> AnswerType:
    try:
        return kind.model_validate_json(response.content)
    except ValidationError as error:
        raise WorkerError(f"{url} is no VRM scoring service, or another version of it: {error}") from error
