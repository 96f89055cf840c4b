"""Sends each request to a judge once, and stores what the judge answered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from pipeline.benchmark.judges.judge import Judge, JudgeOutcome, JudgeRequest, Judgment, Unanswered


class JudgmentStore(Protocol):
    """Keeps judgments, so that no request is sent twice."""

    def get(self, key: str) -> Judgment | None: ...

    def append(self, key: str, judge: Judge, request: JudgeRequest, judgment: Judgment) -> None: ...


def request_key(judge: Judge, request: JudgeRequest) -> str:
    """SHA-256 over the judge, the messages and the sampling settings."""
    identity = {
        "judge": judge.name,
        "model": judge.model,
        "messages": [dict(message) for message in request.messages],
        "sampling": asdict(request.sampling),
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class CollectedOutcomes:
    """The outcomes of all requests, in the order of the requests, and which of them are new."""

    outcomes: tuple[JudgeOutcome, ...]
    keys: tuple[str, ...]
    """Equal requests have equal keys, and are sent once."""
    sent: frozenset[str]
    """Keys of the requests that this run sent to the judge; the store knew the others."""


def collect_outcomes(
    judge: Judge,
    requests: Sequence[JudgeRequest],
    store: JudgmentStore | None,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CollectedOutcomes:
    """The outcome of every request: from the store where the store knows it, otherwise from the judge.

    A new judgment is added to the store. An unanswered request is not: the next run sends it again. A judgment whose
    text is no Unicode text counts as unanswered, from the judge and from the store.

    Args:
        progress: called with (outcomes so far, outcomes in total) after each new one.
    """
    keys = [request_key(judge, request) for request in requests]
    outcomes: dict[str, JudgeOutcome] = {}
    missing: dict[str, JudgeRequest] = {}
    for key, request in zip(keys, requests, strict=True):
        known = store.get(key) if store is not None else None
        readable = known if known is None else _as_unicode(known)
        if isinstance(readable, Judgment):
            outcomes[key] = readable
        else:
            missing[key] = request
    missing_keys = list(missing)
    total = len(outcomes) + len(missing)

    def record(i: int, outcome: JudgeOutcome) -> None:
        key, outcome = missing_keys[i], _as_unicode(outcome)
        if store is not None and isinstance(outcome, Judgment):
            store.append(key, judge, missing[key], outcome)
        outcomes[key] = outcome
        progress(len(outcomes), total)

    judge.judge(list(missing.values()), record)
    return CollectedOutcomes(
        outcomes=tuple(outcomes[key] for key in keys), keys=tuple(keys), sent=frozenset(missing_keys)
    )


def _as_unicode(outcome: JudgeOutcome) -> JudgeOutcome:
    """The outcome without half surrogate pairs, which JSON can spell and no file can hold.

    Such a half is part of an emoji. In the judge's text it leaves the verdict unknown. An alternative to the first
    token that holds one names no answer, so it is dropped.
    """
    if isinstance(outcome, Unanswered):
        return Unanswered(reason=_replaced(outcome.reason))
    if not _is_unicode(outcome.text):
        return Unanswered(reason="the judge's answer is no Unicode text: it holds half a surrogate pair")
    logprobs = {token: value for token, value in outcome.first_token_logprobs.items() if _is_unicode(token)}
    return replace(outcome, first_token_logprobs=logprobs, finish_reason=_replaced(outcome.finish_reason))


def _is_unicode(text: str) -> bool:
    return _replaced(text) == text


def _replaced(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode()
