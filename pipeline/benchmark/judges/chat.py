"""Any endpoint that speaks OpenAI's chat completions, as a judge."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from pipeline.benchmark.judges.judging import JudgeRequest, Judgment, Outcome, Record, Unanswered
from pipeline.errors import ConfigError, PipelineError, WorkerError

CONNECT_S = 10.0
LONGEST_WAIT_S = 60.0
"""Between two attempts, unless the endpoint asks for more."""
FAILURES_IN_A_ROW = 10
"""After so many requests given up one after the other, the endpoint is taken to be down."""


@dataclass(frozen=True, kw_only=True)
class ChatLimits:
    """How hard to press an endpoint, and for how long."""

    concurrency: int = 8
    requests_per_minute: float | None = None
    """Starts of requests, retries included; None for no limit."""
    deadline_s: float = 300.0
    """For one request and its retries."""
    attempts: int = 6
    first_wait_s: float = 1.0
    """Before the first retry; doubled before each further one."""

    def __post_init__(self) -> None:
        too_few = self.concurrency < 1 or self.attempts < 1
        if too_few or self.deadline_s <= 0 or (self.requests_per_minute is not None and self.requests_per_minute <= 0):
            raise ConfigError(f"{self}: concurrency and attempts start at 1, the deadline and the rate above 0")


class ChatJudge:
    """Implements `Judge` over HTTP. The API key goes into one header and nowhere else."""

    def __init__(self, url: str, model: str, *, api_key: str | None, limits: ChatLimits) -> None:
        """
        Args:
            url: up to the version, as in https://api.openai.com/v1.
            api_key: sent as bearer token; None for an endpoint that asks for none.

        Raises:
            ConfigError: the URL is none, or carries credentials; or the key cannot stand in a header.
        """
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"the judge's URL cannot be read: {error}") from error
        if parsed.userinfo or parsed.query:
            raise ConfigError(
                f"the endpoint at {parsed.host} was given with credentials or a query in its URL, which is written to "
                "the results. Put the key into the environment variable instead."
            )
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError(f"{url!r} is no endpoint; give its base URL, as in https://api.openai.com/v1")
        if api_key is not None and (not api_key.isascii() or not api_key.isprintable() or " " in api_key):
            raise ConfigError("the API key holds blanks, line ends or other characters that cannot stand in a header")
        self.name = url.rstrip("/")
        self.model = model
        self._api_key = api_key
        self._limits = limits

    def judge(self, requests: Sequence[JudgeRequest], record: Record) -> None:
        """Asks up to `concurrency` requests at a time.

        When FAILURES_IN_A_ROW requests were given up one after the other, the rest is not asked any more.

        Raises:
            ConfigError: the endpoint refuses the key, or does not know the model.
            WorkerError: the account behind the key has no credit left.
        """
        try:
            asyncio.run(self._judge(requests, record))
        except BaseExceptionGroup as group:
            # One refusal ends the run, so it is one error to the caller.
            refusals, rest = group.split(PipelineError)
            if refusals is None or rest is not None:
                raise
            raise refusals.exceptions[0] from None

    async def _judge(self, requests: Sequence[JudgeRequest], record: Record) -> None:
        queue = iter(enumerate(requests))
        pace = _Pace(self._limits.requests_per_minute)
        failures_in_a_row = 0

        async def work() -> None:
            nonlocal failures_in_a_row
            for i, request in queue:
                if failures_in_a_row >= FAILURES_IN_A_ROW:
                    record(i, Unanswered(reason=f"not asked: {FAILURES_IN_A_ROW} requests in a row had failed"))
                    continue
                await pace.turn()
                try:
                    outcome: Outcome = await self._ask(client, request, pace)
                    failures_in_a_row = 0
                except _Refused as refusal:
                    outcome = Unanswered(reason=str(refusal))
                except _Failed as failure:
                    outcome = Unanswered(reason=str(failure))
                    failures_in_a_row += 1
                record(i, outcome)

        headers = {} if self._api_key is None else {"authorization": f"Bearer {self._api_key}"}
        client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(self._limits.deadline_s, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=self._limits.concurrency),
        )
        async with client, asyncio.TaskGroup() as workers:
            for _ in range(min(self._limits.concurrency, len(requests))):
                workers.create_task(work())

    async def _ask(self, client: httpx.AsyncClient, request: JudgeRequest, pace: _Pace) -> Judgment:
        """The judgment, after as many attempts as it takes and the limits allow."""
        end = time.monotonic() + self._limits.deadline_s
        last = "no answer"
        for attempt in range(self._limits.attempts):
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    if attempt:
                        await pace.turn()
                    return await self._attempt(client, request)
            except TimeoutError:
                raise _Failed(f"deadline of {self._limits.deadline_s:g} s; last: {last}") from None
            except _Transient as failure:
                last, pause = str(failure), failure.retry_after_s
            # Jitter, or workers that failed together would come back together.
            backoff = min(LONGEST_WAIT_S, self._limits.first_wait_s * 2**attempt) * random.uniform(0.5, 1.0)
            if time.monotonic() + pause + backoff > end:
                raise _Failed(f"deadline of {self._limits.deadline_s:g} s; last: {last}")
            pace.hold(pause)
            if attempt + 1 < self._limits.attempts:
                await asyncio.sleep(pause + backoff)
        raise _Failed(last)

    async def _attempt(self, client: httpx.AsyncClient, request: JudgeRequest) -> Judgment:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in request.messages],
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_tokens,
        }
        if sampling.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": sampling.top_logprobs}
        try:
            response = await client.post(f"{self.name}/chat/completions", json=body)
        except httpx.RequestError as error:
            raise _Transient(type(error).__name__) from error
        if response.is_success:
            return _judgment(response)
        raise self._refusal(response)

    def _refusal(self, response: httpx.Response) -> Exception:
        """What an HTTP error means: for this attempt, for this request, or for all of them."""
        status = response.status_code
        words = response.text if self._api_key is None else response.text.replace(self._api_key, "***")
        letter = f"HTTP {status}: {' '.join(words.split()):.200}"
        if status == 429 and "insufficient_quota" in words:
            return WorkerError(f"{self.name}: the account has no credit left ({letter}). Judgments so far are kept.")
        if status == 429 or status >= 500:
            # The body may name a request id: without it, equal failures are counted together.
            return _Transient(f"HTTP {status}", retry_after_s=_retry_after_s(response.headers))
        if status in (401, 403):
            given = "no key was given" if self._api_key is None else "the key was refused"
            return ConfigError(f"{self.name}: {given} ({letter}). Set the environment variable of --api-key-env.")
        if status in (404, 405) or response.is_redirect:
            return ConfigError(
                f"{self.name}/chat/completions with model {self.model!r}: {letter}. Give the base URL of the endpoint, "
                "as in https://api.openai.com/v1, and a model that it serves."
            )
        return _Refused(letter)


class _Pace:
    """When requests may start: evenly spaced, and not while the endpoint asks for a pause."""

    def __init__(self, requests_per_minute: float | None) -> None:
        self._interval_s = 0.0 if requests_per_minute is None else 60.0 / requests_per_minute
        self._next_turn = 0.0
        self._held_until = 0.0

    async def turn(self) -> None:
        while (pause := self._held_until - time.monotonic()) > 0:
            await asyncio.sleep(pause)
        turn = max(time.monotonic(), self._next_turn)
        self._next_turn = turn + self._interval_s
        await asyncio.sleep(turn - time.monotonic())

    def hold(self, seconds: float) -> None:
        self._held_until = max(self._held_until, time.monotonic() + seconds)


class _Transient(Exception):
    """This attempt failed; another one may not."""

    def __init__(self, reason: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class _Failed(Exception):
    """The endpoint did not answer, and the limits allow no further attempt."""


class _Refused(Exception):
    """The endpoint answered that it will not answer this request."""


def _judgment(response: httpx.Response) -> Judgment:
    try:
        body = response.json()
        choice = body["choices"][0]
        text = choice["message"]["content"]
        if not isinstance(text, str | None):
            raise TypeError(f"content is a {type(text).__name__}")
        usage = body.get("usage") or {}
        return Judgment(
            text=text or "",
            first_token_logprobs=_first_token_logprobs(choice.get("logprobs")),
            finish_reason=str(choice.get("finish_reason")),
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
            time=time.time(),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _Transient(f"malformed answer ({type(error).__name__})") from error


def _first_token_logprobs(logprobs: Mapping[str, Any] | None) -> dict[str, float]:
    content = (logprobs or {}).get("content") or []
    return {top["token"]: float(top["logprob"]) for top in content[0]["top_logprobs"]} if content else {}


def _retry_after_s(headers: httpx.Headers) -> float:
    """Seconds of a Retry-After header, a number or a date (RFC 9110, section 10.2.3); 0 without one."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
