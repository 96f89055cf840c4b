"""A language model as a source of reward: it grades each response, or compares the responses to one prompt."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from pipeline.benchmark.judges.chat_judge import ChatJudge, ChatLimits
from pipeline.benchmark.judges.collect_outcomes import JudgmentStore, collect_outcomes
from pipeline.benchmark.judges.judge import Judge, JudgeOutcome, JudgeRequest, JudgeSampling, Judgment, Unanswered
from pipeline.benchmark.judges.judge_prompt import JudgePrompt, require_fields
from pipeline.benchmark.judges.judging_account import Price, judging_account, read_price
from pipeline.benchmark.judges.judgment_cache import JudgmentCache
from pipeline.config.rewards import JudgeReward
from pipeline.errors import ConfigError
from pipeline.records import Message, Metrics
from pipeline.rewards.rows import NoScore, RewardRows, SourceScore, plain_score

GRADED = """[The conversation]
{prompt}

[The assistant's response]
{response}

[Your task]
Grade the response on a scale of {low} to {high} for how well it answers the last turn of the user. Explain briefly,
then end with the grade in double square brackets, as in [[{high}]]."""

PAIRWISE = """[The conversation]
{prompt}

[Response A]
{response_a}

[Response B]
{response_b}

[Your task]
Say which response answers the last turn of the user better. Neither their order nor their length should count. Explain
briefly, then end with [[A]], [[B]], or [[C]] for a tie."""

GRADE = re.compile(r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]")
VERDICT = re.compile(r"\[\[([ABC])\]\]")
FIRST_WINS = {"A": 1.0, "B": 0.0, "C": 0.5}
FIELDS = {"graded": ("prompt", "response"), "pairwise": ("prompt", "response_a", "response_b")}


class MemoryStore:
    """Implements `JudgmentStore` for one run: no request is sent twice."""

    def __init__(self) -> None:
        self._judgments: dict[str, Judgment] = {}

    def get(self, key: str) -> Judgment | None:
        return self._judgments.get(key)

    def append(self, key: str, judge: Judge, request: JudgeRequest, judgment: Judgment) -> None:
        self._judgments[key] = judgment


class JudgeRewardSource:
    """Implements `RewardSource` with any `Judge`."""

    def __init__(
        self, config: JudgeReward, judge: Judge, store: JudgmentStore, *, template: str, price: Price | None = None
    ) -> None:
        self._config = config
        self._judge = judge
        self._store = store
        self._prompt = JudgePrompt(system="You are a fair and careful judge.", user=template)
        self._price = price
        self.account: Metrics = {}
        """`requests`, `sent`, token counts and `cost` of the last step."""

    @classmethod
    def open(cls, config: JudgeReward, exits: ExitStack) -> JudgeRewardSource:
        """Reads template, prices and cache.

        Raises:
            ConfigError: the endpoint or its key cannot be used, or the template cannot be read.
            DataError: the template lacks a field; cache or price list cannot be used.
        """
        limits = ChatLimits(
            concurrency=config.concurrency,
            requests_per_minute=config.requests_per_minute,
            deadline_s=config.deadline_s,
        )
        judge = ChatJudge(config.url, config.model, api_key=api_key(config), limits=limits)
        store: JudgmentStore = MemoryStore()
        if config.cache is not None:
            store = exits.enter_context(JudgmentCache.open(Path(config.cache)))
        price = None if config.prices is None else read_price(Path(config.prices), config.model)
        return cls(config, judge, store, template=template_of(config), price=price)

    def score(self, rows: RewardRows) -> list[SourceScore]:
        """Raises ConfigError or WorkerError where the endpoint can answer no further request."""
        return self._compared(rows) if self._config.form == "pairwise" else self._graded(rows)

    # ------------------------------------------------------------------ graded

    def _graded(self, rows: RewardRows) -> list[SourceScore]:
        low, high = self._config.grade_range
        answers = self._ask(
            [
                self._fields(rows, row) | {"response": response, "low": f"{low:g}", "high": f"{high:g}"}
                for row, response in enumerate(rows.responses)
            ],
            unreadable=lambda text: self._grade(text) is None,
        )
        return [
            answer if isinstance(answer, NoScore) else plain_score(self._grade(answer) or 0.0) for answer in answers
        ]

    def _grade(self, text: str) -> float | None:
        """The last grade of a judgment; None without one in the range."""
        found = GRADE.findall(text)
        low, high = self._config.grade_range
        return float(found[-1]) if found and low <= float(found[-1]) <= high else None

    # ------------------------------------------------------------------ pairwise

    def _compared(self, rows: RewardRows) -> list[SourceScore]:
        """Each response plays the next one of its group, the last plays the first: once shown first, once second."""
        games = [game for members in _members(rows.groups) for game in circle(members)]
        answers = self._ask(
            [
                self._fields(rows, a) | {"response_a": rows.responses[a], "response_b": rows.responses[b]}
                for a, b in games
            ],
            unreadable=lambda text: not VERDICT.search(text),
        )
        points: dict[int, list[float]] = {row: [] for row in range(len(rows))}
        failures: dict[int, NoScore] = {}
        for (a, b), answer in zip(games, answers, strict=True):
            if isinstance(answer, NoScore):
                failures |= {a: answer, b: answer}
                continue
            won = FIRST_WINS[VERDICT.findall(answer)[-1]]
            points[a].append(won)
            points[b].append(1.0 - won)
        alone = NoScore(kind="unanswered", reason="there is no other response to this prompt to compare with")
        return [plain_score(sum(won) / len(won)) if won else failures.get(row, alone) for row, won in points.items()]

    # ------------------------------------------------------------------ both

    def _fields(self, rows: RewardRows, row: int) -> dict[str, str]:
        columns = {name: str(value) for name, value in rows.columns[row].items()}
        return columns | {"prompt": conversation_text(rows.prompts[row])}

    def _ask(self, fields: Sequence[Mapping[str, str]], *, unreadable: Callable[[str], bool]) -> list[str | NoScore]:
        sampling = JudgeSampling(
            temperature=self._config.temperature, max_tokens=self._config.max_tokens, top_logprobs=0
        )
        requests = [JudgeRequest(messages=self._prompt.filled(f), sampling=sampling, pair=None) for f in fields]
        collected = collect_outcomes(self._judge, requests, self._store)
        answers = [_text_or_failure(outcome, unreadable) for outcome in collected.outcomes]
        bad = sum(isinstance(answer, NoScore) and answer.kind == "unreadable" for answer in answers)
        account = judging_account(self._judge, collected, unparsed=bad, price=self._price)
        self.account = {
            "requests": float(account.requests),
            "sent": float(account.sent),
            "prompt_tokens": float(account.prompt_tokens),
            "completion_tokens": float(account.completion_tokens),
        }
        if account.cost_of_this_run is not None:
            self.account["cost"] = account.cost_of_this_run
        return answers


def circle(members: Sequence[int]) -> list[tuple[int, int]]:
    """(shown first, shown second) of each game; none where nobody else is there."""
    return [(a, b) for a, b in zip(members, [*members[1:], members[0]], strict=True) if a != b]


def conversation_text(messages: Sequence[Message]) -> str:
    """The turns as text, each after its speaker."""
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def template_of(config: JudgeReward) -> str:
    """The template of the recipe, or the own one.

    Raises:
        ConfigError: its file cannot be read.
        DataError: it lacks a field.
    """
    if config.template is None:
        return PAIRWISE if config.form == "pairwise" else GRADED
    try:
        text = Path(config.template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"alignment.rewards: judge.template = {config.template} cannot be read: {error}") from error
    require_fields(text, FIELDS[config.form], place=config.template)
    return text


def api_key(config: JudgeReward) -> str | None:
    """The key of the endpoint.

    Raises:
        ConfigError: the variable is not set.
    """
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env)
    if not key:
        raise ConfigError(
            f"alignment.rewards: judge.api_key_env = {config.api_key_env}, and this environment variable is not set. "
            "Set it where the job runs, or leave api_key_env out."
        )
    return key


def _members(groups: Sequence[int]) -> list[list[int]]:
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    return list(members.values())


def _text_or_failure(outcome: JudgeOutcome, unreadable: Callable[[str], bool]) -> str | NoScore:
    if isinstance(outcome, Unanswered):
        return NoScore(kind="unanswered", reason=outcome.reason)
    if unreadable(outcome.text):
        return NoScore(kind="unreadable", reason=f"the judge wrote {outcome.text[-200:]!r}")
    return outcome.text
