"""An endpoint that implements OpenAI's chat completions API, as a judge."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import numpy as np

from pipeline.benchmark.judges.judge import (
    LARGEST_LOGPROB,
    JudgeOutcome,
    JudgeRequest,
    Judgment,
    RecordOutcome,
    Unanswered,
)
from pipeline.errors import ConfigError, PipelineError, WorkerError

CONNECT_TIMEOUT_S = 10.0
LONGEST_WAIT_S = 60.0
"""Longest wait between two attempts, unless the endpoint asks for a longer one."""
WORDS_OF_PARTS = ("text", "refusal")
"""Types of the parts of a message that hold words of the answer; the field has the name of the type."""
FAILURES_IN_A_ROW = 10
"""After this many requests failed in a row, the endpoint counts as down."""


@dataclass(frozen=True, kw_only=True)
class ChatLimits:
    """Limits on the load of an endpoint, and on the time that a request may take."""

    concurrency: int = 8
    requests_per_minute: float | None = None
    """Requests started per minute, retries included; None for no limit."""
    deadline_s: float = 300.0
    """Time limit of one request including its retries."""
    attempts: int = 6
    first_wait_s: float = 1.0
    """Wait before the first retry; it doubles before each further one."""

    def __post_init__(self) -> None:
        too_few = self.concurrency < 1 or self.attempts < 1
        if too_few or self.deadline_s <= 0 or (self.requests_per_minute is not None and self.requests_per_minute <= 0):
            raise ConfigError(f"{self}: concurrency and attempts must be at least 1, the deadline and the rate above 0")


class ChatJudge:
    """Implements `Judge` over HTTP. The API key is sent in one header, and appears in no file and no message."""

    def __init__(self, url: str, model: str, *, api_key: str | None, limits: ChatLimits) -> None:
        """
        Args:
            url: base URL with the version, as in https://api.openai.com/v1.
            api_key: sent as bearer token; None for an endpoint that needs no key.

        Raises:
            ConfigError: the URL is invalid or contains credentials; or the key cannot be sent in a header.
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

    def judge(self, requests: Sequence[JudgeRequest], record: RecordOutcome) -> None:
        """Sends up to `concurrency` requests at a time.

        After FAILURES_IN_A_ROW requests failed in a row, the remaining requests are not sent.

        Raises:
            ConfigError: the endpoint refuses the key, or does not serve the model.
            WorkerError: the account of the key has no credit left.
        """
        try:
            asyncio.run(self._judge(requests, record))
        except BaseExceptionGroup as group:
            # A refused key ends the run, so the caller gets that one error and no group.
            refusals, rest = group.split(PipelineError)
            if refusals is None or rest is not None:
                raise
            raise refusals.exceptions[0] from None

    async def _judge(self, requests: Sequence[JudgeRequest], record: RecordOutcome) -> None:
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
                    outcome: JudgeOutcome = await self._ask(client, request, pace)
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
            timeout=httpx.Timeout(self._limits.deadline_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=self._limits.concurrency),
        )
        async with client, asyncio.TaskGroup() as workers:
            for _ in range(min(self._limits.concurrency, len(requests))):
                workers.create_task(work())

    async def _ask(self, client: httpx.AsyncClient, request: JudgeRequest, pace: _Pace) -> Judgment:
        """The judgment, after as many attempts as the limits allow."""
        end = time.monotonic() + self._limits.deadline_s
        last_failure = "no answer"
        for attempt in range(self._limits.attempts):
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    if attempt:
                        await pace.turn()
                    return await self._attempt(client, request)
            except TimeoutError:
                raise _Failed(f"deadline of {self._limits.deadline_s:g} s; last: {last_failure}") from None
            except _Transient as failure:
                last_failure, pause = str(failure), failure.retry_after_s
            # Random jitter: without it, workers that failed together would retry together.
            backoff = min(LONGEST_WAIT_S, self._limits.first_wait_s * 2**attempt) * random.uniform(0.5, 1.0)
            if time.monotonic() + pause + backoff > end:
                raise _Failed(f"deadline of {self._limits.deadline_s:g} s; last: {last_failure}")
            pace.hold(pause)
            if attempt + 1 < self._limits.attempts:
                await asyncio.sleep(pause + backoff)
        raise _Failed(last_failure)

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
        if not response.is_success:
            raise self._refusal(response.status_code, response.text, response.headers)
        try:
            body = response.json()
            choice, failure = _choice_or_error(body)
            if failure is None:
                return _judgment(choice, body.get("usage") or {})
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as malformed:
            raise _Transient(f"malformed answer ({type(malformed).__name__})") from malformed
        raise self._error_in_answer(failure, response.headers)

    def _error_in_answer(self, error: Any, headers: httpx.Headers) -> Exception:
        """The error for an HTTP 200 whose body says that the provider failed; its code counts as the HTTP status.

        An error without such a code is tried again. The provider's words are kept.
        """
        text = json.dumps(error, ensure_ascii=False)
        code, message = (error.get("code"), error.get("message")) if isinstance(error, dict) else (None, error)
        status = int(str(code)) if re.fullmatch(r"[45]\d\d", str(code), re.ASCII) else 500
        refusal = self._refusal(429 if "insufficient_quota" in text else status, text, headers)
        if isinstance(refusal, _Transient):
            words = self._shown(message if isinstance(message, str) else text)
            return _Transient(f"HTTP 200 with an error: {words}", retry_after_s=refusal.retry_after_s)
        return refusal

    def _shown(self, text: str) -> str:
        """The beginning of a provider's text on one line, without the key."""
        hidden = text if self._api_key is None else text.replace(self._api_key, "***")
        return f"{' '.join(hidden.split()):.200}"

    def _refusal(self, status: int, body: str, headers: httpx.Headers) -> Exception:
        """The error for an HTTP status: it ends the attempt, the request or the whole run."""
        message = f"HTTP {status}: {self._shown(body)}"
        if status == 429 and "insufficient_quota" in body:
            return WorkerError(f"{self.name}: the account has no credit left ({message}). Judgments so far are kept.")
        if status == 429 or status >= 500:
            # The body may contain a request id. Without the body, equal failures are counted together.
            return _Transient(f"HTTP {status}", retry_after_s=_retry_after_s(headers))
        if status in (401, 403):
            problem = "no key was given" if self._api_key is None else "the key was refused"
            return ConfigError(f"{self.name}: {problem} ({message}). Set the environment variable of --api-key-env.")
        if status in (404, 405) or 300 <= status < 400:
            return ConfigError(
                f"{self.name}/chat/completions with model {self.model!r}: {message}. Give the base URL of the "
                "endpoint, as in https://api.openai.com/v1, and a model that it serves."
            )
        return _Refused(message)


class _Pace:
    """Spaces the starts of requests evenly, and starts none while the endpoint asks for a pause."""

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
    """This attempt failed; another attempt may succeed."""

    def __init__(self, reason: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class _Failed(Exception):
    """The endpoint did not answer, and the limits allow no further attempt."""


class _Refused(Exception):
    """The endpoint refused to answer this request."""


def _choice_or_error(body: Mapping[str, Any]) -> tuple[Mapping[str, Any], Any]:
    """The first choice of a body, and the error that the body or the choice holds; None without one."""
    if error := body.get("error"):
        return {}, error
    choice = body["choices"][0]
    return choice, choice.get("error") or None


def _judgment(choice: Mapping[str, Any], usage: Mapping[str, Any]) -> Judgment:
    return Judgment(
        text=_text_of(choice["message"]),
        first_token_logprobs=_first_token_logprobs(choice.get("logprobs")),
        finish_reason=str(choice.get("finish_reason")),
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
        time=time.time(),
    )


def _text_of(message: Mapping[str, Any]) -> str:
    """The judge's words: a text, a list of parts, or the refusal in their place. Parts of thought are left out.

    Raises:
        KeyError, TypeError: there are no words.
    """
    content = message["content"]
    if content is None:
        content = message.get("refusal") or ""
    elif isinstance(content, list):
        words = [part[part["type"]] for part in content if part["type"] in WORDS_OF_PARTS]
        content = "".join(words) if words else None
    if not isinstance(content, str):
        raise TypeError(f"content is a {type(content).__name__}")
    return content


def _first_token_logprobs(logprobs: Mapping[str, Any] | None) -> dict[str, float]:
    """The alternatives to the first token. Several tokens may read the same; then their probabilities are added."""
    content = (logprobs or {}).get("content") or []
    sums: dict[str, float] = {}
    for top in content[0]["top_logprobs"] if content else ():
        token, logprob = top["token"], float(top["logprob"])
        if not logprob <= LARGEST_LOGPROB:
            raise ValueError(f"{logprob} is no log-probability")
        sums[token] = float(np.logaddexp(sums[token], logprob)) if token in sums else logprob
    return sums


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
