"""Several calls in one batch of the model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from pipeline.errors import PipelineError
from pipeline.objectives.reweighting import Factors
from pipeline.ports import RewardScorer
from pipeline.records import Message, RewardScore
from pipeline.serving.scoring_service import RowFactors, Rows


class SteerableScorer(RewardScorer, Protocol):
    """A reward model whose objectives can be re-weighted."""

    def score(
        self,
        prompts: Sequence[tuple[Message, ...]],
        responses: Sequence[str],
        factors: Sequence[Factors | None] | None = None,
    ) -> list[RewardScore]:
        """As `RewardScorer`, with factors of the objective weights for each row."""


def score_together(
    scorer: SteerableScorer, calls: Sequence[Rows], factors: Sequence[RowFactors | None] | None = None
) -> list[list[RewardScore] | PipelineError]:
    """Scores calls that arrived together as one batch. Each call gets its own scores, or its own error.

    Args:
        factors: of each call; None where it takes the model's own weights.
    """
    factors = [None] * len(calls) if factors is None else factors
    prompts = [prompt for prompts, _ in calls for prompt in prompts]
    responses = [response for _, responses in calls for response in responses]
    try:
        if any(given is not None for given in factors):
            of_rows = [
                factor
                for given, (_, texts) in zip(factors, calls, strict=True)
                for factor in given or [None] * len(texts)
            ]
            scores = scorer.score(prompts, responses, of_rows)
        else:
            scores = scorer.score(prompts, responses)
    except PipelineError as error:
        if len(calls) == 1:
            return [error]
        # One bad call must not fail the calls that arrived with it.
        alone = zip(calls, factors, strict=True)
        return [result for call, given in alone for result in score_together(scorer, [call], [given])]
    ends = [0]
    for _, responses in calls:
        ends.append(ends[-1] + len(responses))
    return [scores[first:last] for first, last in pairwise(ends)]
