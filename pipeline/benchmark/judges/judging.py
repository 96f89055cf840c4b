"""Asking a judge: the port, and what travels through it.

A benchmark turns its files into `JudgeRequest`s, any `Judge` answers them, and the benchmark turns the answers into the
rows that its own scorer reads. What a judge says is kept as it was said; the benchmark's parser reads it afterwards.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

from pipeline.errors import DataError
from pipeline.records import Message


@dataclass(frozen=True, kw_only=True)
class JudgeSampling:
    """How the judge answers."""

    temperature: float
    max_tokens: int
    top_logprobs: int
    """Alternatives to return for each token, with their log-probabilities; 0 asks for none."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the messages of a request ask, for a judge that scores answers instead of reading messages."""

    prompt: tuple[Message, ...]
    answer_a: str
    """The answer the messages show first."""
    answer_b: str
    verdict_a: str
    """What a judge writes when answer a is the better one, in the words of the benchmark."""
    verdict_b: str
    verdict_tie: str


@dataclass(frozen=True, kw_only=True)
class JudgePrompt:
    """What a judge is told, with {names} where a question and its answers stand."""

    system: str
    user: str

    def filled(self, fields: Mapping[str, str]) -> tuple[Message, ...]:
        return ({"role": "system", "content": self.system}, {"role": "user", "content": fill(self.user, fields)})


@dataclass(frozen=True, kw_only=True)
class JudgeRequest:
    """One thing to ask a judge."""

    messages: tuple[Message, ...]
    sampling: JudgeSampling
    comparison: Comparison | None
    """None where the judge is asked for a grade."""


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """What a judge answered."""

    text: str
    first_token_logprobs: Mapping[str, float]
    """Token -> natural log-probability of the alternatives to the first token; empty where none were given."""
    finish_reason: str
    prompt_tokens: int | None
    """None where the judge does not count."""
    completion_tokens: int | None
    time: float
    """Of the answer, seconds since the epoch."""


@dataclass(frozen=True, kw_only=True)
class Unanswered:
    """A request that was given up: a result like any other, to be counted."""

    reason: str


Outcome = Judgment | Unanswered
Record = Callable[[int, Outcome], None]


class Judge(Protocol):
    """Whoever compares or grades answers."""

    @property
    def name(self) -> str:
        """Where the judge is: an endpoint, a file, "vrm"."""

    @property
    def model(self) -> str:
        """Who the judge is; goes into the output files."""

    def judge(self, requests: Sequence[JudgeRequest], record: Record) -> None:
        """Calls `record(i, outcome)` once for each request, in any order, as soon as its outcome is known.

        Raises:
            PipelineError: nothing more can be asked; what was recorded stays.
        """


class Store(Protocol):
    """Remembers judgments, so that nothing is asked twice."""

    def get(self, key: str) -> Judgment | None: ...

    def append(self, key: str, judge: Judge, request: JudgeRequest, judgment: Judgment) -> None: ...


def request_key(judge: Judge, request: JudgeRequest) -> str:
    """SHA-256 over who is asked, what, and with which sampling settings."""
    identity = {
        "judge": judge.name,
        "model": judge.model,
        "messages": [dict(message) for message in request.messages],
        "sampling": asdict(request.sampling),
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The outcomes of all requests, in their order, and which of them are new."""

    outcomes: tuple[Outcome, ...]
    keys: tuple[str, ...]
    """Equal for equal requests, which are asked once."""
    asked: frozenset[str]
    """Keys of the requests that this run sent to the judge; the others were known."""


def collect(
    judge: Judge,
    requests: Sequence[JudgeRequest],
    store: Store | None,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Collected:
    """The outcome of every request: remembered where the store knows it, else asked, and remembered when answered.

    What a judge did not answer is not remembered: the next run asks it again.

    Args:
        progress: called with (outcomes so far, outcomes in all) after each new one.
    """
    keys = [request_key(judge, request) for request in requests]
    outcomes: dict[str, Outcome] = {}
    missing: dict[str, JudgeRequest] = {}
    for key, request in zip(keys, requests, strict=True):
        known = store.get(key) if store is not None else None
        if known is not None:
            outcomes[key] = known
        else:
            missing[key] = request
    asked = list(missing)
    total = len(outcomes) + len(asked)

    def record(i: int, outcome: Outcome) -> None:
        if store is not None and isinstance(outcome, Judgment):
            store.append(asked[i], judge, missing[asked[i]], outcome)
        outcomes[asked[i]] = outcome
        progress(len(outcomes), total)

    judge.judge(list(missing.values()), record)
    return Collected(outcomes=tuple(outcomes[key] for key in keys), keys=tuple(keys), asked=frozenset(asked))


# ----------------------------------------------------------------------------- from outcomes to the benchmark's rows


@dataclass(frozen=True, kw_only=True)
class JudgedRows:
    """Rows in the layout of the benchmark's own scorer."""

    rows: list[dict[str, Any]]
    unparsed: int
    """Judgments without a verdict that the benchmark's parser can read. Their rows are there, without a verdict."""


class JudgedBenchmark(Protocol):
    """One benchmark, one model's answers: what to ask, and what to write."""

    @property
    def requests(self) -> Sequence[JudgeRequest]: ...

    def rows(self, outcomes: Sequence[Outcome], judge: Judge) -> JudgedRows:
        """Rows for the outcomes of `requests`, in their order."""


class QuestionAnswer(Protocol):
    """An answer that knows its question, its model and where it was read."""

    @property
    def question_id(self) -> Any: ...

    @property
    def model(self) -> str: ...

    @property
    def place(self) -> str: ...


A = TypeVar("A", bound=QuestionAnswer)


def answers_of_one_model(
    answers: Sequence[A], needed: Sequence[Any], *, known: Sequence[Any] | None, what: str
) -> tuple[str, dict[Any, A]]:
    """The model's name, and its answer to each question.

    Args:
        needed: question ids that must be answered.
        known: question ids that may be; None where others do no harm.
        what: what the answers are, for the letter.

    Raises:
        DataError: several models, two answers to one question, one to a question that is not known, or a needed one
            missing.
    """
    if not answers:
        raise DataError(f"there are no {what}; give those of one model")
    model = answers[0].model
    by_question: dict[Any, A] = {}
    for answer in answers:
        if answer.model != model:
            raise DataError(f"{answer.place}: {answer.model} among the {what} of {model}; give one model's")
        if known is not None and answer.question_id not in known:
            raise DataError(
                f"{answer.place}: {model} answers question {answer.question_id}, which is not among the "
                f"{len(known)} questions. Give the question file that was answered."
            )
        if answer.question_id in by_question:
            first = by_question[answer.question_id].place
            raise DataError(f"{answer.place}: {model} answers question {answer.question_id} again, as in {first}")
        by_question[answer.question_id] = answer
    missing = [question_id for question_id in needed if question_id not in by_question]
    if missing:
        raise DataError(
            f"the {what} of {model}, which end at {answers[-1].place}, lack {len(missing)} of {len(needed)} questions, "
            f"as {missing[0]}. "
            "Generate them, or leave those questions out of the question file and of every other answer file."
        )
    return model, by_question


def fill(template: str, fields: Mapping[str, str]) -> str:
    """The template with each `{name}` of `fields` replaced, in one pass: what is filled in is never searched again."""
    names = "|".join(map(re.escape, fields))
    return re.sub(rf"\{{({names})\}}", lambda match: fields[match[1]], template)


def require_fields(template: str, names: Sequence[str], *, place: str) -> None:
    """Raises DataError when the template does not place every one of these fields."""
    missing = [name for name in names if f"{{{name}}}" not in template]
    if missing:
        raise DataError(f"{place}: the template has no {', '.join(f'{{{name}}}' for name in missing)}")
