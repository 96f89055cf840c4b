"""Sends each request to a judge once, and stores what the judge answered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from pipeline.benchmark.judges.judge import Judge, JudgeOutcome, JudgeRequest, Judgment


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

    A new judgment is added to the store. An unanswered request is not: the next run sends it again.

    Args:
        progress: called with (outcomes so far, outcomes in total) after each new one.
    """
    keys = [request_key(judge, request) for request in requests]
    outcomes: dict[str, JudgeOutcome] = {}
    missing: dict[str, JudgeRequest] = {}
    for key, request in zip(keys, requests, strict=True):
        known = store.get(key) if store is not None else None
        if known is not None:
            outcomes[key] = known
        else:
            missing[key] = request
    missing_keys = list(missing)
    total = len(outcomes) + len(missing)

    def record(i: int, outcome: JudgeOutcome) -> None:
        key = missing_keys[i]
        if store is not None and isinstance(outcome, Judgment):
            store.append(key, judge, missing[key], outcome)
        outcomes[key] = outcome
        progress(len(outcomes), total)

    judge.judge(list(missing.values()), record)
    return CollectedOutcomes(
        outcomes=tuple(outcomes[key] for key in keys), keys=tuple(keys), sent=frozenset(missing_keys)
    )
