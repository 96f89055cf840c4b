"""The port to a judge, and the records that pass through it.

A benchmark turns its files into `JudgeRequest`s, and any `Judge` answers them. The benchmark then turns the answers
into the rows that its own scorer reads. An answer is kept word for word; the benchmark's parser reads it afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.records import Message

LARGEST_LOGPROB = 0.01
"""Rounding may leave a log-probability slightly above 0. A larger value, or NaN, is no log-probability."""


@dataclass(frozen=True, kw_only=True)
class JudgeSampling:
    """Sampling settings of the judge's answer."""

    temperature: float
    max_tokens: int
    top_logprobs: int
    """Number of alternatives to return for each token, with their log-probabilities; 0 asks for none."""


@dataclass(frozen=True, kw_only=True)
class AnswerPair:
    """The two answers that a request compares, for a judge that scores answers and does not read the messages."""

    prompt: tuple[Message, ...]
    answer_a: str
    """The answer that the messages show first."""
    answer_b: str
    verdict_a: str
    """What a judge writes when answer a is the better one, in the benchmark's notation."""
    verdict_b: str
    verdict_tie: str


@dataclass(frozen=True, kw_only=True)
class JudgeRequest:
    """One request for a verdict or for a grade."""

    messages: tuple[Message, ...]
    sampling: JudgeSampling
    pair: AnswerPair | None
    """The answers to compare; None where the request asks for a grade."""


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """A judge's answer to one request."""

    text: str
    first_token_logprobs: Mapping[str, float]
    """Token -> natural log-probability of the alternatives to the first token; empty where none were given."""
    finish_reason: str
    prompt_tokens: int | None
    """None where the judge does not count tokens."""
    completion_tokens: int | None
    time: float
    """When the judge answered, in seconds since the epoch."""


@dataclass(frozen=True, kw_only=True)
class Unanswered:
    """A request that was given up. It counts as an outcome, so that the account can report it."""

    reason: str


JudgeOutcome = Judgment | Unanswered
RecordOutcome = Callable[[int, JudgeOutcome], None]


class Judge(Protocol):
    """Compares or grades answers."""

    @property
    def name(self) -> str:
        """Where the judge is: an endpoint, a file, "vrm"."""

    @property
    def model(self) -> str:
        """Name of the model that judges; the output files contain it."""

    def judge(self, requests: Sequence[JudgeRequest], record: RecordOutcome) -> None:
        """Calls `record(i, outcome)` once for each request, in any order, as soon as its outcome is known.

        Raises:
            PipelineError: the judge can answer no further request. Outcomes already recorded stay valid.
        """
