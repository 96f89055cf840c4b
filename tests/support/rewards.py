"""Rewards of a run, as small as a test needs them."""

from pipeline.evaluation.reward_scale import RewardScale
from pipeline.rewards.combined import CombinedRewards, WeightedSource
from pipeline.rewards.model_reward import ModelRewardSource

UNIT_SCALE = RewardScale(mean=0.0, std=1.0)


def rewards_of(scorer, scale=UNIT_SCALE):
    """A reward model alone, as recipes without `alignment.rewards` have it."""
    source = WeightedSource(name="model", source=ModelRewardSource(scorer), weight=1.0, scale=scale)
    return CombinedRewards([source])
