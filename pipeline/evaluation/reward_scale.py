"""The scale of the reward: mean and standard deviation on held-out responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.models.reward_model_card import RewardModelCard


@dataclass(frozen=True, kw_only=True)
class RewardScale:
    """Mean and standard deviation of the reward on held-out responses; they define the z-score."""

    mean: float
    std: float
    posterior_std: float = 0.0
    """Mean standard deviation of a reward; 0 for a model without error bars."""

    @classmethod
    def of(cls, card: RewardModelCard) -> RewardScale:
        return cls(mean=card.reward_mean, std=card.reward_std, posterior_std=card.calibration.posterior_std)
