"""Objectives re-weighted at run time."""

import pytest
import torch

from pipeline.errors import DataError
from pipeline.evaluation.reward_scorer import RewardModelScorer
from pipeline.objectives.reweighting import factors_of, reweighted
from pipeline.rewards.model_reward import SteeredModel

NAMES = ("helpfulness", "safety", "brevity")


def test_weights_are_multiplied_and_normalised_again():
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.4, 0.4]])
    factors = torch.tensor([[1.0, 2.0, 1.0], [0.0, 1.0, 3.0]])
    # .5 + .6 + .2 = 1.3, and 0 + .4 + 1.2 = 1.6
    expected = torch.tensor([[0.5 / 1.3, 0.6 / 1.3, 0.2 / 1.3], [0.0, 0.25, 0.75]])
    torch.testing.assert_close(reweighted(weights, factors), expected)


def test_a_factor_adds_its_logarithm_to_the_logit():
    logits, factors = torch.tensor([[0.3, -1.0, 2.0]]), torch.tensor([[1.0, 5.0, 0.5]])
    torch.testing.assert_close(reweighted(logits.softmax(-1), factors), (logits + factors.log()).softmax(-1))


def test_factors_stand_in_the_order_of_the_model_and_equal_ones_are_none():
    assert factors_of({"safety": 2}, NAMES, place="here") == (1.0, 2.0, 1.0)
    assert factors_of(dict.fromkeys(NAMES, 3.0), NAMES, place="here") is None
    with pytest.raises(DataError, match=r"here: weights name 'honesty', which is no objective .* helpfulness, safety"):
        factors_of({"honesty": 2}, NAMES, place="here")
    with pytest.raises(DataError, match="0 for every objective"):
        factors_of(dict.fromkeys(NAMES, 0.0), NAMES, place="here")


def rows_of(world):
    pairs = world.heldout_pairs()[:3]
    return [p.prompt for p in pairs], [p.chosen for p in pairs]


def test_a_steered_model_scores_by_the_new_weights_with_an_error_bar_and_equal_weights_change_nothing(
    trained_reward_model, world
):
    scorer = RewardModelScorer.load(trained_reward_model, max_tokens_per_batch=4096)
    rows, objectives = rows_of(world), scorer.card.objectives
    own = scorer.score(*rows)
    assert SteeredModel(scorer, dict.fromkeys(objectives, 7.0)).score(*rows) == own
    steered = SteeredModel(scorer, {objectives[1]: 4.0}).score(*rows)
    for new, old in zip(steered, own, strict=True):
        products = [w * (4.0 if k == 1 else 1.0) for k, w in enumerate(old.objective_weights)]
        assert new.objective_weights == pytest.approx([p / sum(products) for p in products], rel=1e-5)
        assert new.objective_scores == old.objective_scores
        expected = sum(w * s for w, s in zip(new.objective_weights, new.objective_scores, strict=True))
        assert new.mean == pytest.approx(expected, abs=1e-6)
        assert new.std == pytest.approx(torch.tensor(new.deviations).norm().item(), rel=1e-5)
    assert [s.mean for s in steered] != [s.mean for s in own]


def test_rows_of_one_batch_may_be_steered_differently(trained_reward_model, world):
    scorer = RewardModelScorer.load(trained_reward_model, max_tokens_per_batch=4096)
    prompts, responses = rows_of(world)
    factors = (1.0, 4.0, *(1.0,) * (len(scorer.card.objectives) - 2))
    mixed = scorer.score(prompts, responses, [None, factors, None])
    own = scorer.score(prompts, responses)
    assert (mixed[0], mixed[2]) == (own[0], own[2])
    assert mixed[1].objective_weights != own[1].objective_weights
