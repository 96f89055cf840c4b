"""The account of a judging run: requests, answers, verdicts, tokens and cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.benchmark.judges.collect_outcomes import CollectedOutcomes
from pipeline.benchmark.judges.judge import Judge, Judgment, Unanswered
from pipeline.data.files import read_json
from pipeline.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Price:
    """Price of one judge model per million tokens, in the currency of the price list."""

    prompt: float
    completion: float


def read_price(path: Path, model: str) -> Price:
    """The price of a model in a JSON price list {model: {"prompt": ..., "completion": ...}}, per million tokens.

    Raises:
        DataError: the list cannot be read, or does not name the model.
    """
    try:
        prices = read_json(path)
        price = Price(prompt=float(prices[model]["prompt"]), completion=float(prices[model]["completion"]))
    except (DataError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} has no price for {model!r} ({error!r}). "
            f'Add {{"{model}": {{"prompt": 2.5, "completion": 10.0}}}}, per million tokens.'
        ) from error
    return price


@dataclass(frozen=True, kw_only=True)
class JudgingAccount:
    """Requests, answers, verdicts, tokens and cost of one run."""

    judge: str
    model: str
    requests: int
    """Distinct requests of the benchmark."""
    sent: int
    """Requests that this run sent to the judge; the cache knew the others."""
    unanswered: Mapping[str, int]
    """Reason -> number of requests without a judgment."""
    unparsed: int
    """Judgments in which the parser found no verdict."""
    prompt_tokens: int
    """Tokens of all judgments, from this run or an earlier one."""
    completion_tokens: int
    uncounted: int
    """Judgments without token counts. With any, the true tokens and cost are higher than reported here."""
    cost: float | None
    """Cost of all judgments; None without a price."""
    cost_of_this_run: float | None

    def lines(self) -> list[tuple[str, str]]:
        """(label, value) pairs for the terminal."""
        lines = [
            ("judge", f"{self.model} ({self.judge})"),
            ("requests", f"{self.requests}, of which {self.sent} sent now and {self.requests - self.sent} known"),
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


def judging_account(
    judge: Judge, collected: CollectedOutcomes, *, unparsed: int, price: Price | None
) -> JudgingAccount:
    """The account of a run. Equal requests count once."""
    outcomes = dict(zip(collected.keys, collected.outcomes, strict=True))
    judgments = {key: outcome for key, outcome in outcomes.items() if isinstance(outcome, Judgment)}
    new = [judgment for key, judgment in judgments.items() if key in collected.sent]
    prompt_tokens, completion_tokens = _tokens(judgments.values())
    reasons = Counter(outcome.reason for outcome in outcomes.values() if isinstance(outcome, Unanswered))
    return JudgingAccount(
        judge=judge.name,
        model=judge.model,
        requests=len(outcomes),
        sent=len(collected.sent),
        unanswered=dict(reasons.most_common()),
        unparsed=unparsed,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        uncounted=sum(judgment.prompt_tokens is None for judgment in judgments.values()),
        cost=None if price is None else _cost(judgments.values(), price),
        cost_of_this_run=None if price is None else _cost(new, price),
    )


def _tokens(judgments: Iterable[Judgment]) -> tuple[int, int]:
    counts = [(j.prompt_tokens or 0, j.completion_tokens or 0) for j in judgments]
    return sum(prompt for prompt, _ in counts), sum(completion for _, completion in counts)


def _cost(judgments: Iterable[Judgment], price: Price) -> float:
    prompt_tokens, completion_tokens = _tokens(judgments)
    return (prompt_tokens * price.prompt + completion_tokens * price.completion) / 1e6
