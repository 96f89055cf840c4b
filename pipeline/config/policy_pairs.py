"""Pairs, or best responses, that the policy writes itself and a reward model ranks."""

from __future__ import annotations

from typing import Literal

from pipeline.config.base import Count, Frozen, NonNegative


class PolicyPairsConfig(Frozen):
    """Read where `alignment.pairs` is "policy".

    Every round samples `alignment.samples_per_prompt` responses to each of its prompts from the policy of the round
    before, ranks them, and trains on the best against the worst: online-iterative DPO (Dong et al. 2024,
    arXiv:2405.07863). One round is DPO on the policy's own pairs.
    """

    rounds: Count = 1
    """Rounds of sampling, ranking and training."""
    prompts_per_round: Count = 1024
    """Prompts of a round."""
    lcb_coefficient: NonNegative = 0.0
    """Responses are ranked by the mean of the reward minus this many posterior standard deviations."""
    least_margin: NonNegative = 0.0
    """Pairs whose responses lie nearer are left out; in standard deviations of the reward on held-out responses."""
    reference: Literal["start", "round"] = "start"
    """The reference policy: the policy before alignment, or the policy that wrote the pairs of the round."""
