"""The annotator of the planted world as a scorer: the true reward, of which the training data show a noisy part."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.data.planted import GoldAnnotator
from pipeline.records import Message, RewardScore


class GoldScorer:
    """Implements `RewardScorer` with the planted reward, and explains it by the planted weights and scores."""

    def __init__(self) -> None:
        self._gold = GoldAnnotator()

    def score(self, prompts: Sequence[Sequence[Message]], responses: Sequence[str]) -> list[RewardScore]:
        """The gold reward of each response.

        Raises:
            DataError: a prompt does not come from the planted world.
        """
        return [self._score(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]

    def _score(self, prompt: Sequence[Message], response: str) -> RewardScore:
        weights, scores = self._gold.objective_weights(prompt), self._gold.objective_scores(prompt, response)
        return RewardScore(
            mean=self._gold.reward(prompt, response),
            std=0.0,
            objective_weights=tuple(weights.values()),
            objective_scores=tuple(scores.values()),
        )
