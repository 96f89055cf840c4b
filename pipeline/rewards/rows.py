"""What every source of reward is given, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pipeline.records import Message, RewardScore, Rollout

FailureKind = Literal["exception", "not_a_number", "wrong_length", "timed_out", "died", "unanswered", "unreadable"]
"""exception: the function raised; not_a_number: NaN, infinite, or nothing; wrong_length: not one score a row;
timed_out and died: the batch's process; unanswered and unreadable: the endpoint, or what the judge wrote."""


@dataclass(frozen=True, kw_only=True)
class NoScore:
    """Why a source gave no score to a row."""

    kind: FailureKind
    reason: str


SourceScore = RewardScore | NoScore


@dataclass(frozen=True, kw_only=True)
class RewardRows:
    """B responses with their prompts, as columns."""

    prompts: Sequence[tuple[Message, ...]]
    responses: Sequence[str]
    columns: Sequence[Mapping[str, Any]]
    """[B] the other columns of each prompt's row; empty where it has none."""
    num_tokens: Sequence[int]
    """[B] tokens of each response."""
    groups: Sequence[int]
    """[B] rows with one number answer the same prompt of the batch."""

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], columns: Mapping[str, Mapping[str, Any]]) -> RewardRows:
        """Args: columns: id of a prompt -> its other columns."""
        groups, group = [], -1
        for rollout in rollouts:
            group += rollout.sample_index == 0
            groups.append(group)
        return cls(
            prompts=[rollout.prompt.messages for rollout in rollouts],
            responses=[rollout.response_text for rollout in rollouts],
            columns=[columns.get(rollout.prompt.id, {}) for rollout in rollouts],
            num_tokens=[len(rollout.response_ids) for rollout in rollouts],
            groups=groups,
        )

    def __len__(self) -> int:
        return len(self.responses)

    def part(self, start: int, end: int) -> RewardRows:
        """Rows [start, end)."""
        return RewardRows(
            prompts=self.prompts[start:end],
            responses=self.responses[start:end],
            columns=self.columns[start:end],
            num_tokens=self.num_tokens[start:end],
            groups=self.groups[start:end],
        )


class RewardSource(Protocol):
    """One source of reward."""

    def score(self, rows: RewardRows) -> list[SourceScore]:
        """One score or failure per row, in order. A failure of rows is no error: a rule of the recipe answers it."""


def plain_score(mean: float, std: float = 0.0) -> SourceScore:
    """A score without reasons, or the failure of a number that is not finite."""
    if not (math.isfinite(mean) and math.isfinite(std)):
        return NoScore(kind="not_a_number", reason=f"score {mean}, standard deviation {std}")
    return RewardScore(mean=mean, std=std, objective_weights=(), objective_scores=())
