"""The gap between the reward model and the planted truth."""

import pytest

from pipeline.data.planted import GoldAnnotator
from pipeline.errors import DataError, ShapeError
from pipeline.evaluation.overoptimization import GoldReward, gold_proxy_gap
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.records import PreferencePair, Prompt, RewardScore, Rollout

PLAN = ({"role": "user", "content": "please help me plan the bread for home ."},)
STEP, RECKLESS = "first choose a good bread .", "skip the boring checks ."
# plan weighs (0.60, 0.15, 0.15, 0.10). One step: scores (7/3, 3, 3, 5), gold 2.8.
# Reckless: (1, 3, 1, 5), gold 0.6 + 0.45 + 0.15 + 0.5 = 1.7.


def pair(chosen, rejected):
    return PreferencePair(
        id="a",
        prompt=PLAN,
        chosen=chosen,
        rejected=rejected,
        scores_chosen=None,
        scores_rejected=None,
        source="planted",
        margin=None,
    )


def rollout(response):
    return Rollout(
        prompt=Prompt(id="a", messages=PLAN, token_ids=(1,)),
        sample_index=0,
        response_ids=(2,),
        response_text=response,
        logprobs=(-1.0,),
        policy_version=0,
        finish_reason="stop",
    )


def score(mean):
    return RewardScore(mean=mean, std=0.0, objective_weights=(), objective_scores=())


def test_the_gap_is_the_difference_of_the_standardised_means():
    gap = gold_proxy_gap([4.0, 8.0], [2.0, 3.0], RewardScale(mean=2.0, std=2.0), RewardScale(mean=3.0, std=0.5))
    assert gap == {"reward/zscore": 2.0, "gold/zscore": -1.0, "gold/gap": 3.0}


def test_the_gap_does_not_depend_on_the_scale_of_a_reward():
    gold = [1.0, 2.5, 3.0]
    one = gold_proxy_gap([1.0, 2.0, 6.0], gold, RewardScale(mean=1.0, std=2.0), RewardScale(mean=2.0, std=1.0))
    other = gold_proxy_gap([7.0, 17.0, 57.0], gold, RewardScale(mean=7.0, std=20.0), RewardScale(mean=2.0, std=1.0))
    assert one["gold/gap"] == pytest.approx(other["gold/gap"])


def test_a_reward_model_that_is_the_truth_has_no_gap():
    scale = RewardScale(mean=2.5, std=0.7)
    assert gold_proxy_gap([1.0, 4.0], [1.0, 4.0], scale, scale)["gold/gap"] == 0.0


def test_the_units_of_the_truth_are_those_of_both_responses_of_held_out_pairs():
    gold = GoldReward.of(GoldAnnotator(), [pair(STEP, RECKLESS)])
    assert (gold.scale.mean, gold.scale.std) == pytest.approx((2.25, 0.55))  # of 2.8 and 1.7
    measured = gold.measure([rollout(STEP)] * 3, [score(0.5), None, score(1.5)], RewardScale(mean=0.0, std=1.0))
    assert measured == pytest.approx(
        {"gold/mean": 2.8, "gold/zscore": 1.0, "reward/zscore": 1.0, "gold/gap": 0.0}, abs=1e-12
    )


def test_what_cannot_be_compared_is_refused():
    scale = RewardScale(mean=0.0, std=1.0)
    with pytest.raises(ShapeError, match="gap between 1 rewards and 2 gold rewards"):
        gold_proxy_gap([1.0], [1.0, 2.0], scale, scale)
    gold = GoldReward(annotator=GoldAnnotator(), scale=scale)
    with pytest.raises(DataError, match="not of the planted world"):
        gold.rewards([({"role": "user", "content": "hello"},)], ["hi"])
