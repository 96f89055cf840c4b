"""Two responses to one prompt: margin, spread, probability and reasons."""

import math
from dataclasses import replace

import pytest
import torch

from pipeline.config.reward import EnsembleConfig
from pipeline.evaluation.reward_scorer import reward_scores
from pipeline.models.reward_heads import EnsembleHead
from pipeline.objectives.reward_comparison import (
    compare_rewards,
    rank_by_lower_bound,
    relative_contributions,
    reward_covariance,
)
from pipeline.records import RewardScore

A = RewardScore(
    mean=1.0, std=0.5, objective_weights=(0.5, 0.5), objective_scores=(2.0, 0.0), deviations=(0.3, 0.4), temperature=2.0
)
B = RewardScore(
    mean=0.5,
    std=0.5,
    objective_weights=(0.5, 0.5),
    objective_scores=(0.0, 1.0),
    deviations=(0.0, -0.5),
    temperature=2.0,
)


def plain(mean, std=0.0):
    """A Bradley-Terry score."""
    return RewardScore(mean=mean, std=std, objective_weights=(), objective_scores=())


def test_a_comparison_by_hand():
    # u_a - u_b = (0.3, 0.9): Var = 0.09 + 0.81
    result = compare_rewards(A, B)
    assert result.margin == 0.5
    assert result.margin_std**2 == pytest.approx(0.9)
    assert reward_covariance(A, B) == pytest.approx(-0.2)
    assert result.log_odds == pytest.approx(0.5 / math.sqrt(4 + math.pi / 8 * 0.9))
    assert result.probability == pytest.approx(1 / (1 + math.exp(-result.log_odds)))
    assert result.contributions == (1.0, -0.5)
    assert result.deciding == 0


def test_an_answer_is_confident_above_the_threshold_and_never_without_one():
    result = compare_rewards(plain(2.0), plain(1.0))  # log-odds 1
    assert result.is_confident(0.9)
    assert compare_rewards(plain(1.0), plain(2.0)).is_confident(0.9)
    assert not result.is_confident(1.0)
    assert not result.is_confident(None)


def test_exchanging_the_responses_turns_everything_around():
    one, other = compare_rewards(A, B), compare_rewards(B, A)
    assert one.probability + other.probability == pytest.approx(1.0)
    assert other.contributions == (-1.0, 0.5)
    # Objective 1 speaks for B here, but objective 0 decides against it.
    assert other.deciding == 0


def test_the_deciding_objective_speaks_for_the_preferred_response():
    worse = RewardScore(mean=-3.0, std=0.1, objective_weights=(0.5, 0.5), objective_scores=(4.0, -10.0))
    nothing = RewardScore(mean=0.0, std=0.1, objective_weights=(0.5, 0.5), objective_scores=(0.0, 0.0))
    assert compare_rewards(worse, nothing).contributions == (2.0, -5.0)
    assert compare_rewards(worse, nothing).deciding == 1


def test_a_contribution_is_what_an_objective_adds_above_the_mean_held_out_response():
    score = RewardScore(mean=-3.0, std=0.1, objective_weights=(0.5, 0.5), objective_scores=(4.0, -10.0))
    assert relative_contributions(score, (1.5, -1.0)) == (0.5, -4.0)  # -3.5, and the reward is -3 against 0.5
    assert relative_contributions(score, ()) == (2.0, -5.0)  # a model that was never evaluated has the mean 0
    assert relative_contributions(plain(2.0), ()) == ()


def test_a_response_against_itself_is_an_even_match_without_doubt():
    result = compare_rewards(A, A)
    assert (result.probability, result.margin, result.deciding) == (0.5, 0.0, None)
    assert result.margin_std == pytest.approx(0.0)


def test_a_bradley_terry_model_gives_a_probability_without_reasons():
    result = compare_rewards(plain(2.0), plain(1.0))
    assert result.probability == pytest.approx(0.7310586)
    assert (result.margin_std, result.contributions, result.deciding) == (0.0, (), None)


def test_a_prompt_that_was_cut_differently_for_each_response_still_adds_up():
    other = RewardScore(mean=0.8, std=0.5, objective_weights=(0.2, 0.8), objective_scores=(0.0, 1.0))
    assert sum(compare_rewards(replace(A, deviations=()), other).contributions) == pytest.approx(0.2)


def test_scores_without_deviations_are_compared_as_if_independent():
    assert compare_rewards(plain(2.0, std=3.0), plain(1.0, std=4.0)).margin_std == pytest.approx(5.0)


def test_without_a_bound_the_highest_mean_wins():
    assert rank_by_lower_bound([plain(1.0), plain(3.0), plain(2.0)], lcb=0.0) == [(1, 3.0), (2, 2.0), (0, 1.0)]


def test_a_doubtful_reward_must_be_larger_to_win():
    assert rank_by_lower_bound([plain(3.0, std=2.0), plain(2.0, std=0.5)], lcb=1.0) == [(1, 1.5), (0, 1.0)]


def test_equal_responses_stay_in_the_order_given():
    assert [i for i, _ in rank_by_lower_bound([plain(1.0), plain(2.0), plain(1.0), plain(2.0)], lcb=0.0)] == [
        1,
        3,
        0,
        2,
    ]


def test_an_ensemble_doubts_a_pair_as_much_as_its_members_disagree_on_it():
    # Members reward the pair (1, 0), (2, 3), (6, 3): margins 1, -1, 3.
    head = EnsembleHead(2, EnsembleConfig(members=3))
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 3.0], [6.0, 3.0]]))
        a, b = reward_scores(head(torch.eye(2), torch.eye(2), None), temperature=1.0)
    assert compare_rewards(a, b).margin == pytest.approx(1.0)
    assert compare_rewards(a, b).margin_std ** 2 == pytest.approx((0 + 4 + 4) / 3)
    assert compare_rewards(a, a).margin_std == pytest.approx(0.0, abs=5e-3)


def test_rewards_that_are_no_sum_over_objectives_are_compared_without_reasons():
    network = [
        RewardScore(mean=m, std=0.0, objective_weights=(0.5, 0.5), objective_scores=(), concentration=9)
        for m in (2.0, 0.0)
    ]
    result = compare_rewards(*network)
    assert (result.contributions, result.deciding) == ((), None)
