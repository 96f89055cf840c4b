"""The HTTP routes of the service in this process."""

import asyncio

import pytest

from pipeline.config.cluster import ScoringConfig
from pipeline.evaluation.reward_scorer import RewardModelScorer
from pipeline.serving.admission import Admission
from pipeline.serving.cache import ScoreCache
from pipeline.serving.http.app import build_api
from pipeline.serving.scoring_service import ScoringService, describe_model

FIDELITY = {
    f"reasons/{name}/{metric}": value
    for name, share in (("helpfulness", 0.81), ("honesty", 0.7), ("safety", 0.66), ("brevity", 0.5))
    for metric, value in (("pair_accuracy", share), ("pairs", 100.0))
}
"""As if held-out pairs had verified all objectives but brevity."""


@pytest.fixture(scope="session")
def trained_api(trained_reward_model):
    """The application of one replica; it remembers no scores, so every answer comes from the model."""
    scorer = RewardModelScorer.load(trained_reward_model, max_tokens_per_batch=4096)

    async def score_rows(rows, *factors):
        return await asyncio.to_thread(scorer.score, *rows, *factors)

    config = ScoringConfig(cache_entries=0)
    service = ScoringService(
        score_rows,
        describe_model(scorer.card.model_copy(update={"metrics": FIDELITY}), config, "f00d", {}),
        admission=Admission(config.max_pending_rows),
        cache=ScoreCache(config.cache_entries),
        deadline_s=60.0,
    )
    return build_api(service, token=None, replica="r1")
