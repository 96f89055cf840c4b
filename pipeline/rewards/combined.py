"""All sources of a run as one reward: each asked, its failures answered by its rule, then combined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from pipeline.errors import WorkerError
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.objectives.reward_combination import group_decoupled, weighted_sum
from pipeline.records import Metrics, RewardScore, Rollout, ScoredRollouts
from pipeline.rewards.judge_reward import JudgeRewardSource
from pipeline.rewards.rows import NoScore, RewardRows, RewardSource, SourceScore

FAILURES_SHOWN = 2
"""Of each source and step, with prompt and response; the others are counted."""
TEXT_SHOWN = 200
"""Characters of a prompt and of a response."""

Combination = Literal["sum", "gdpo"]


@dataclass(frozen=True, kw_only=True)
class WeightedSource:
    """A source with what the recipe says of it."""

    name: str
    source: RewardSource
    weight: float
    scale: RewardScale
    """Of its own scores, on held-out responses."""
    on_failure: Literal["drop"] | float = "drop"


class CombinedRewards:
    """Implements `RewardSources`."""

    def __init__(
        self,
        sources: Sequence[WeightedSource],
        combination: Combination = "sum",
        *,
        columns: Mapping[str, Mapping[str, Any]] | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        """
        Args:
            columns: id of a prompt -> the other columns of its row.
            report: is told of failures, a line or more at a time.
        """
        self.sources = tuple(sources)
        self._combination = combination
        self._columns = columns or {}
        self._report = report

    @property
    def scale(self) -> RewardScale:
        """Mean and standard deviation of the combined reward on held-out responses.

        A single source keeps its own units. Several are in units of a held-out standard deviation around 0.
        """
        trained = self._trained
        if len(trained) == 1 and self._combination == "sum":
            [only] = trained
            scale, weight = only.scale, only.weight
            return RewardScale(
                mean=weight * scale.mean, std=weight * scale.std, posterior_std=weight * scale.posterior_std
            )
        units = [source.weight * source.scale.posterior_std / source.scale.std for source in trained]
        uncertainty = float(np.linalg.norm(units)) if self._combination == "sum" else 0.0
        return RewardScale(mean=0.0, std=1.0, posterior_std=uncertainty)

    def score(self, rollouts: Sequence[Rollout]) -> ScoredRollouts:
        rows = RewardRows.of(rollouts, self._columns)
        answers = {source.name: source.source.score(rows) for source in self.sources}
        for source in self.sources:
            self._tell_failures(source, answers[source.name], rows)
        by_source = {s.name: [self._by_its_rule(s, answer) for answer in answers[s.name]] for s in self.sources}
        kept = [row for row in range(len(rows)) if all(by_source[s.name][row] is not None for s in self._trained)]
        if not kept:
            raise self._nothing_left(answers)
        scores: list[RewardScore | None] = [None] * len(rows)
        for row, score in zip(kept, self._combined(by_source, kept, rows), strict=True):
            scores[row] = score
        return ScoredRollouts(
            scores=tuple(scores),
            by_source={name: tuple(column) for name, column in by_source.items()},
            metrics=source_metrics(answers) | self._accounts() | {"reward/dropped": float(len(rows) - len(kept))},
        )

    # ------------------------------------------------------------------ combination

    @property
    def _trained(self) -> list[WeightedSource]:
        return [source for source in self.sources if source.weight > 0]

    def _combined(
        self, by_source: Mapping[str, Sequence[RewardScore | None]], kept: Sequence[int], rows: RewardRows
    ) -> list[RewardScore]:
        """The reward of each kept row."""
        trained = self._trained
        table = [[score for row in kept if (score := by_source[s.name][row]) is not None] for s in trained]
        if len(trained) == 1 and self._combination == "sum":
            return [_times(score, trained[0].weight) for score in table[0]]
        means = torch.tensor([[score.mean for score in column] for column in table]).T
        stds = torch.tensor([[score.std for score in column] for column in table]).T
        weights = torch.tensor([source.weight for source in trained])
        if self._combination == "gdpo":
            sums = group_decoupled(means, weights, torch.tensor([rows.groups[row] for row in kept]))
            errors = torch.zeros_like(sums)
        else:
            sums, errors = weighted_sum(
                means,
                stds,
                weights,
                heldout_means=torch.tensor([source.scale.mean for source in trained]),
                heldout_stds=torch.tensor([source.scale.std for source in trained]),
            )
        return [
            RewardScore(mean=mean, std=std, objective_weights=(), objective_scores=())
            for mean, std in zip(sums.tolist(), errors.tolist(), strict=True)
        ]

    def _accounts(self) -> Metrics:
        """`reward/<source>/requests` and the like, of sources that keep an account."""
        judges = {s.name: s.source for s in self.sources if isinstance(s.source, JudgeRewardSource)}
        return {
            f"reward/{name}/{what}": value for name, judge in judges.items() for what, value in judge.account.items()
        }

    # ------------------------------------------------------------------ failures

    def _by_its_rule(self, source: WeightedSource, answer: SourceScore) -> RewardScore | None:
        if isinstance(answer, RewardScore):
            return answer
        if source.on_failure == "drop":
            return None
        return RewardScore(mean=float(source.on_failure), std=0.0, objective_weights=(), objective_scores=())

    def _tell_failures(self, source: WeightedSource, answers: Sequence[SourceScore], rows: RewardRows) -> None:
        failed = [(row, answer) for row, answer in enumerate(answers) if isinstance(answer, NoScore)]
        if not failed:
            return
        rule = "left out of the step" if source.on_failure == "drop" else f"scored {source.on_failure:g}"
        if source.weight == 0:
            rule = "not measured"
        lines = [f"reward {source.name}: {len(failed)} of {len(answers)} responses without a score, {rule}"]
        for row, answer in failed[:FAILURES_SHOWN]:
            lines += [
                f"  {answer.kind}: {_shown(answer.reason)}",
                f"    prompt    {_shown(rows.prompts[row][-1]['content'] if rows.prompts[row] else '')}",
                f"    response  {_shown(rows.responses[row])}",
            ]
        self._report("\n".join(lines))

    def _nothing_left(self, answers: Mapping[str, Sequence[SourceScore]]) -> WorkerError:
        counts = Counter(
            f"{source.name}: {answer.kind}, {answer.reason:.200}"
            for source in self._trained
            for answer in answers[source.name]
            if isinstance(answer, NoScore)
        )
        reasons = "; ".join(f"{reason} ({count} times)" for reason, count in counts.most_common(3))
        return WorkerError(
            f"no response of this step has a reward from every source, so there is nothing to train on: {reasons}. "
            "Mend the source, or give it a fixed score (alignment.rewards: on_failure). The same command resumes."
        )


def source_metrics(answers: Mapping[str, Sequence[SourceScore]]) -> Metrics:
    """`reward/<source>`, the mean of what it says; `reward/<source>/std`; `reward/<source>/failed*`, counts of rows.

    A source that gave no score at all has no mean. A score by rule is no score of the source.
    """
    metrics: Metrics = {}
    for name, column in answers.items():
        means = [answer.mean for answer in column if isinstance(answer, RewardScore)]
        if means:
            metrics |= {f"reward/{name}": float(np.mean(means)), f"reward/{name}/std": float(np.std(means))}
        kinds = Counter(answer.kind for answer in column if isinstance(answer, NoScore))
        metrics[f"reward/{name}/failed"] = float(kinds.total())
        metrics |= {f"reward/{name}/failed/{kind}": float(count) for kind, count in kinds.items()}
    return metrics


def _times(score: RewardScore, weight: float) -> RewardScore:
    """The score as it is where the weight is 1: nothing is rounded anew."""
    if weight == 1.0:
        return score
    return RewardScore(mean=weight * score.mean, std=weight * score.std, objective_weights=(), objective_scores=())


def _shown(text: str) -> str:
    """The text on one line, cut."""
    line = " ".join(text.split())
    return line if len(line) <= TEXT_SHOWN else f"{line[:TEXT_SHOWN]}..."
