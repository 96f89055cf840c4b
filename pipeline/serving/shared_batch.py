"""Several calls in one batch of the model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pipeline.errors import PipelineError
from pipeline.ports import RewardScorer
from pipeline.records import RewardScore
from pipeline.serving.scoring_service import Rows


def score_together(scorer: RewardScorer, calls: Sequence[Rows]) -> list[list[RewardScore] | PipelineError]:
    """Scores calls that arrived together as one batch. Each call gets its own scores, or its own error."""
    try:
        scores = scorer.score(
            [prompt for prompts, _ in calls for prompt in prompts],
            [response for _, responses in calls for response in responses],
        )
    except PipelineError as error:
        if len(calls) == 1:
            return [error]
        # One bad call must not fail the calls that arrived with it.
        return [result for call in calls for result in score_together(scorer, [call])]
    ends = [0]
    for _, responses in calls:
        ends.append(ends[-1] + len(responses))
    return [scores[first:last] for first, last in pairwise(ends)]
