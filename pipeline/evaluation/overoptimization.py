"""Over-optimisation: the gap between the reward model and the gold reward, where the gold reward is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.planted import GoldAnnotator
from pipeline.errors import ShapeError
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.records import Message, Metrics, PreferencePair, RewardScore, Rollout


@dataclass(frozen=True, kw_only=True)
class GoldReward:
    """The gold annotator, with the scale of its reward."""

    annotator: GoldAnnotator
    scale: RewardScale

    @classmethod
    def of(cls, annotator: GoldAnnotator, heldout: Sequence[PreferencePair]) -> GoldReward:
        """Takes the scale from the gold rewards of all held-out responses, as the reward model does with its own."""
        rewards = [annotator.reward(p.prompt, response) for p in heldout for response in (p.chosen, p.rejected)]
        return cls(annotator=annotator, scale=RewardScale(mean=float(np.mean(rewards)), std=float(np.std(rewards))))

    def rewards(self, prompts: Sequence[Sequence[Message]], responses: Sequence[str]) -> list[float]:
        """The gold reward of each response.

        Raises:
            DataError: a prompt does not come from the planted world.
        """
        return [self.annotator.reward(prompt, text) for prompt, text in zip(prompts, responses, strict=True)]

    def measure(
        self, rollouts: Sequence[Rollout], proxy: Sequence[RewardScore | None], proxy_scale: RewardScale
    ) -> Metrics:
        """`gold/mean` and the terms of `gold_proxy_gap` over the rollouts that have a reward.

        Args:
            proxy: the reward of each, before any transform that the policy is trained on.
            proxy_scale: its mean and standard deviation on held-out responses.
        """
        scored = [(rollout, score.mean) for rollout, score in zip(rollouts, proxy, strict=True) if score is not None]
        gold = self.rewards([r.prompt.messages for r, _ in scored], [r.response_text for r, _ in scored])
        gap = gold_proxy_gap([mean for _, mean in scored], gold, proxy_scale, self.scale)
        return {"gold/mean": float(np.mean(gold))} | gap


def gold_proxy_gap(
    proxy: Sequence[float], gold: Sequence[float], proxy_scale: RewardScale, gold_scale: RewardScale
) -> Metrics:
    """gap = (mean r - m_r) / s_r - (mean g - m_g) / s_g,  in standard deviations of held-out responses.

    The gap is near 0 if the model is right on average. It grows if the policy finds responses that the model likes and
    the gold reward does not. Standardised rewards make models of different scale comparable.

    Source: the divergence of proxy and gold reward under optimisation, Gao et al. 2022, arXiv:2210.10760, Fig. 1. The
    units are ours.

    Args:
        proxy, gold: [N] rewards of the same responses.
        proxy_scale, gold_scale: (m, s) of each over held-out responses.

    Returns:
        `reward/zscore`, `gold/zscore`, and `gold/gap`, the first minus the second.

    Raises:
        ShapeError: the two differ in length, or are empty.
    """
    if len(proxy) != len(gold) or not proxy:
        raise ShapeError(
            f"gap between {len(proxy)} rewards and {len(gold)} gold rewards: give equally many, at least one"
        )
    proxy_zscore = (float(np.mean(proxy)) - proxy_scale.mean) / max(proxy_scale.std, 1e-8)
    gold_zscore = (float(np.mean(gold)) - gold_scale.mean) / max(gold_scale.std, 1e-8)
    return {"reward/zscore": proxy_zscore, "gold/zscore": gold_zscore, "gold/gap": proxy_zscore - gold_zscore}
