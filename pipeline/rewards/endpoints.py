"""Reward models behind a URL, in the forms of OpenRLHF and vLLM. The project's own form has its own client."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from pipeline.config.rewards import ModelReward
from pipeline.errors import DataError, WorkerError
from pipeline.records import Message
from pipeline.rewards.rows import NoScore, RewardRows, SourceScore, plain_score
from pipeline.serving.client import CONNECTION_TIMEOUT_S, Pause, exchange
from pipeline.serving.protocol import TOKEN_VARIABLE

CONCURRENCY = 8
"""Requests in flight."""
ROWS_PER_REQUEST = 64
"""Of OpenRLHF's form, which takes many rows in one request."""


class Endpoint:
    """Implements `RewardSource` over HTTP. A request that is not answered fails for its rows alone."""

    def __init__(self, config: ModelReward, *, transport: httpx.BaseTransport | None = None) -> None:
        self._config = config
        self._url = config.place.rstrip("/")
        token = os.environ.get(TOKEN_VARIABLE)
        self._client = httpx.Client(
            headers={} if token is None else {"authorization": f"Bearer {token}"},
            limits=httpx.Limits(max_connections=CONCURRENCY),
            transport=transport,
        )

    def score(self, rows: RewardRows) -> list[SourceScore]:
        """Raises ConfigError where the endpoint refuses the token, or the URL cannot be asked."""
        size = 1 if self._config.form == "vllm" else ROWS_PER_REQUEST
        ends_at = time.monotonic() + self._config.deadline_s
        parts = [rows.part(start, start + size) for start in range(0, len(rows), size)]
        with ThreadPoolExecutor(CONCURRENCY) as threads:
            return [score for scores in threads.map(lambda part: self._part(part, ends_at), parts) for score in scores]

    def close(self) -> None:
        self._client.close()

    def _part(self, rows: RewardRows, ends_at: float) -> list[SourceScore]:
        call = self._openrlhf if self._config.form == "openrlhf" else self._vllm
        try:
            return call(rows, ends_at)
        except (WorkerError, DataError) as error:
            return [NoScore(kind="unanswered", reason=str(error))] * len(rows)

    def _openrlhf(self, rows: RewardRows, ends_at: float) -> list[SourceScore]:
        """{query: prompt and response in one text, prompts: their beginnings} -> {rewards}."""
        prompts = [rendered(messages) for messages in rows.prompts]
        texts = [prompt + response for prompt, response in zip(prompts, rows.responses, strict=True)]
        answer = self._post(self._url, {"query": texts, "prompts": prompts, "labels": [""] * len(rows)}, ends_at)
        return _numbers(self._url, answer, "rewards", len(rows))

    def _vllm(self, rows: RewardRows, ends_at: float) -> list[SourceScore]:
        """{messages} that end with the response -> {data: [{probs: [reward]}]}; the server renders them itself."""
        [prompt], [response] = rows.prompts, rows.responses
        body: dict[str, Any] = {
            "messages": [*(dict(message) for message in prompt), {"role": "assistant", "content": response}],
            "use_activation": False,
        }
        if self._config.served_name is not None:
            body["model"] = self._config.served_name
        answer = self._post(f"{self._url}/classify", body, ends_at)
        try:
            [reward] = answer["data"][0]["probs"]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise not_of_the_form(self._url, "vllm", answer) from error
        return _numbers(self._url, {"probs": [reward]}, "probs", 1)

    def _post(self, url: str, body: Any, ends_at: float) -> Any:
        """The JSON of an answer, after as many attempts as `exchange` makes."""
        steps = exchange(url, self._config.deadline_s, ends_at=ends_at)
        outcome: httpx.Response | httpx.TransportError | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as answered:
                try:
                    return answered.value.json()
                except ValueError as error:
                    raise not_of_the_form(url, self._config.form, answered.value.text) from error
            if isinstance(step, Pause):
                time.sleep(step.seconds)
                outcome = None
                continue
            timeout = httpx.Timeout(step.timeout_s, connect=min(step.timeout_s, CONNECTION_TIMEOUT_S))
            try:
                outcome = self._client.post(url, json=body, timeout=timeout)
            except httpx.TransportError as error:
                outcome = error


def rendered(messages: Sequence[Message]) -> str:
    """The prompt in ChatML, up to the beginning of the response: OpenRLHF sends what its policy saw, as one text."""
    turns = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages)
    return f"{turns}<|im_start|>assistant\n"


def not_of_the_form(url: str, form: str, answer: Any) -> WorkerError:
    return WorkerError(
        f"{url} does not answer in the form {form!r}: {str(answer)[:200]!r}. Set the form of the endpoint "
        "(alignment.rewards: model.form)."
    )


def _numbers(url: str, answer: Any, field: str, count: int) -> list[SourceScore]:
    values = answer.get(field) if isinstance(answer, dict) else None
    if not isinstance(values, list) or len(values) != count:
        raise not_of_the_form(url, f"{field} of {count} rows", answer)
    return [
        plain_score(float(value))
        if isinstance(value, int | float) and not isinstance(value, bool)
        else NoScore(kind="not_a_number", reason=f"{value!r:.80} is no number")
        for value in values
    ]
