"""What judging cost: what was asked, answered, understood and paid."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.benchmark.judges.judging import Collected, Judge, Judgment, Unanswered
from pipeline.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Price:
    """Of one judge model, per million tokens, in whatever currency the price list uses."""

    prompt: float
    completion: float


def read_price(path: Path, model: str) -> Price:
    """The price of a model in a JSON price list {model: {"prompt": ..., "completion": ...}}, per million tokens.

    Raises:
        DataError: the list cannot be read, or does not name the model.
    """
    try:
        prices = json.loads(path.read_text())
        price = Price(prompt=float(prices[model]["prompt"]), completion=float(prices[model]["completion"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} has no price for {model!r} ({error!r}). "
            f'Add {{"{model}": {{"prompt": 2.5, "completion": 10.0}}}}, per million tokens.'
        ) from error
    return price


@dataclass(frozen=True, kw_only=True)
class JudgingAccount:
    """What was asked, answered, understood and paid."""

    judge: str
    model: str
    requests: int
    """Of the benchmark, each counted once, however often it occurs."""
    asked: int
    """Sent by this run; the others were known."""
    unanswered: Mapping[str, int]
    """Reason -> number of requests without a judgment."""
    unparsed: int
    """Judgments without a readable verdict."""
    prompt_tokens: int
    """Of all judgments, asked now or earlier."""
    completion_tokens: int
    uncounted: int
    """Judgments whose tokens nobody counted: tokens and cost are at least what is said here."""
    cost: float | None
    """Of all judgments; None without a price."""
    cost_of_this_run: float | None

    def lines(self) -> list[tuple[str, str]]:
        """(what, value), for the terminal."""
        lines = [
            ("judge", f"{self.model} ({self.judge})"),
            ("requests", f"{self.requests}, of which {self.asked} asked now and {self.requests - self.asked} known"),
            ("unanswered", str(sum(self.unanswered.values()))),
            *((f"  {reason}", str(count)) for reason, count in self.unanswered.items()),
            ("without a readable verdict", str(self.unparsed)),
            ("prompt tokens", str(self.prompt_tokens)),
            ("completion tokens", str(self.completion_tokens)),
        ]
        if self.uncounted:
            lines.append(("judgments without token counts", str(self.uncounted)))
        if self.cost is not None and self.cost_of_this_run is not None:
            lines.append(("cost", f"{self.cost:.4f}, of which this run {self.cost_of_this_run:.4f}"))
        return lines


def account(judge: Judge, collected: Collected, *, unparsed: int, price: Price | None) -> JudgingAccount:
    """The account of a run; equal requests count once."""
    outcomes = dict(zip(collected.keys, collected.outcomes, strict=True))
    judgments = {key: outcome for key, outcome in outcomes.items() if isinstance(outcome, Judgment)}
    new = [judgment for key, judgment in judgments.items() if key in collected.asked]
    prompt_tokens, completion_tokens = _tokens(judgments.values())
    reasons = Counter(outcome.reason for outcome in outcomes.values() if isinstance(outcome, Unanswered))
    return JudgingAccount(
        judge=judge.name,
        model=judge.model,
        requests=len(outcomes),
        asked=len(collected.asked),
        unanswered=dict(reasons.most_common()),
        unparsed=unparsed,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        uncounted=sum(judgment.prompt_tokens is None for judgment in judgments.values()),
        cost=None if price is None else _cost(judgments.values(), price),
        cost_of_this_run=None if price is None else _cost(new, price),
    )


def _tokens(judgments: Iterable[Judgment]) -> tuple[int, int]:
    counted = [(j.prompt_tokens or 0, j.completion_tokens or 0) for j in judgments]
    return sum(prompt for prompt, _ in counted), sum(completion for _, completion in counted)


def _cost(judgments: Iterable[Judgment], price: Price) -> float:
    prompt_tokens, completion_tokens = _tokens(judgments)
    return (prompt_tokens * price.prompt + completion_tokens * price.completion) / 1e6
