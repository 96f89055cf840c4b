"""The units of a z-scored reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.models.reward_model import RewardModelCard


@dataclass(frozen=True, kw_only=True)
class RewardScale:
    """Mean and standard deviation of the reward model on held-out responses: the units of a z-scored reward."""

    mean: float
    std: float
    posterior_std: float = 0.0
    """Mean of what the model is uncertain by; 0 for one without uncertainty."""

    @classmethod
    def of(cls, card: RewardModelCard) -> RewardScale:
        posterior_std = card.metrics.get("eval/posterior_std", 0.0)
        return cls(mean=card.reward_mean, std=card.reward_std, posterior_std=posterior_std)
