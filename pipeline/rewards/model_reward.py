"""A reward model as one source among others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.config.rewards import ModelReward
from pipeline.errors import DataError, WorkerError
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.objectives.reweighting import factors_of
from pipeline.ports import RewardScorer
from pipeline.records import Message, RewardScore
from pipeline.rewards.rows import NoScore, RewardRows, SourceScore
from pipeline.serving.client import VRMScorer, as_reward_score

if TYPE_CHECKING:
    from pipeline.evaluation.reward_scorer import RewardModelScorer


class ModelRewardSource:
    """What a reward model says of prompt and response; it reads no other column."""

    def __init__(self, scorer: RewardScorer) -> None:
        self._scorer = scorer

    def score(self, rows: RewardRows) -> list[SourceScore]:
        return list(self._scorer.score(rows.prompts, rows.responses))


class SteeredModel:
    """Implements `RewardScorer` with a model in this process and re-weighted objectives."""

    def __init__(self, scorer: RewardModelScorer, weights: Mapping[str, float]) -> None:
        """Raises DataError for a name that is no objective of the model."""
        self._scorer = scorer
        self._factors = factors_of(weights, scorer.card.objectives, place="alignment.rewards")

    def score(self, prompts: Sequence[tuple[Message, ...]], responses: Sequence[str]) -> list[RewardScore]:
        return self._scorer.score(prompts, responses, [self._factors] * len(responses))


class RemoteVRM:
    """Implements `RewardSource` with a VRM scoring service behind a URL. One failure fails all rows of a step."""

    def __init__(self, config: ModelReward) -> None:
        self._client = VRMScorer(config.place, deadline_s=config.deadline_s)
        self._weights = config.weights

    def scale(self) -> RewardScale:
        """Mean and standard deviation of the model's held-out rewards.

        Raises:
            ConfigError, WorkerError: the service cannot be asked, or is none.
        """
        model = self._client.model()
        return RewardScale(mean=model.reward_mean, std=model.reward_std)

    def score(self, rows: RewardRows) -> list[SourceScore]:
        """Raises ConfigError where the service refuses the token."""
        try:
            answer = self._client.score_rows(rows.prompts, rows.responses, weights=self._weights)
        except (WorkerError, DataError) as error:
            return [NoScore(kind="unanswered", reason=str(error))] * len(rows)
        return [as_reward_score(scored) for scored in answer.scores]

    def close(self) -> None:
        self._client.close()
