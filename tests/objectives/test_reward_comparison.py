"""Two responses to one prompt: margin, spread, probability and reasons."""

import math

import pytest
import torch

from pipeline.config.reward import EnsembleConfig, VRMHeadConfig
from pipeline.evaluation.reward_scorer import reward_scores
from pipeline.models.reward_heads import EnsembleHead, VRMHead
from pipeline.objectives.reward_comparison import (
    compare_rewards,
    rank_by_lower_bound,
    relative_contributions,
    reward_covariance,
)
from pipeline.objectives.variational import reward_mean_and_variance, sampled_reward_moments
from pipeline.records import RewardScore

# alpha = (1.5, 1.5), no feature noise: w_bar = (1/2, 1/2), A = 3, C = [[1/16, -1/16], [-1/16, 1/16]].
A = RewardScore(mean=1.0, std=0.5, objective_weights=(0.5, 0.5), objective_scores=(2.0, 0.0), concentration=3.0)
B = RewardScore(mean=0.5, std=0.25, objective_weights=(0.5, 0.5), objective_scores=(0.0, 1.0), concentration=3.0)


def plain(mean, std=0.0):
    """A Bradley-Terry score."""
    return RewardScore(mean=mean, std=std, objective_weights=(), objective_scores=())


def test_a_comparison_by_hand():
    # D = (2, -1): E = 1 - 1/2; Var = D^T C D = (4 + 4 + 1) / 16.
    result = compare_rewards(A, B)
    assert result.margin == 0.5
    assert result.margin_std == pytest.approx(0.75)
    assert reward_covariance(A, B) == pytest.approx(-0.125)
    assert result.probability == pytest.approx(1 / (1 + math.exp(-0.5 / math.sqrt(1 + math.pi / 8 * 0.5625))))
    assert result.contributions == (1.0, -0.5)
    assert result.deciding == 0


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


def test_a_pair_has_the_moments_of_the_difference_of_its_features():
    """Delta = <w, S (z_a - z_b)>, and z_a - z_b is Gaussian: the closed form of one response applies to it."""
    torch.manual_seed(0)
    alpha, score_matrix = torch.rand(1, 4) * 3 + 0.2, torch.randn(4, 6)
    mu, logvar = torch.randn(2, 6), torch.randn(2, 6) * 0.5
    expected_mean, expected_variance = reward_mean_and_variance(
        alpha, mu[:1] - mu[1:], torch.log(logvar[:1].exp() + logvar[1:].exp()), score_matrix
    )
    mean, variance = reward_mean_and_variance(alpha.expand(2, 4), mu, logvar, score_matrix)
    w_bar = tuple((alpha / alpha.sum())[0].tolist())
    a, b = (
        RewardScore(
            mean=mean[i].item(),
            std=math.sqrt(variance[i].item()),
            objective_weights=w_bar,
            objective_scores=tuple((mu[i] @ score_matrix.T).tolist()),
            concentration=alpha.sum().item(),
        )
        for i in (0, 1)
    )
    result = compare_rewards(a, b)
    assert result.margin == pytest.approx(expected_mean.item(), abs=1e-5)
    assert result.margin_std == pytest.approx(math.sqrt(expected_variance.item()), rel=1e-5)
    assert sum(result.contributions) == pytest.approx(result.margin, abs=1e-5)


def test_a_prompt_that_was_cut_differently_for_each_response_still_adds_up():
    other = RewardScore(mean=0.8, std=0.3, objective_weights=(0.2, 0.8), objective_scores=(0.0, 1.0), concentration=9.0)
    result = compare_rewards(A, other)
    assert sum(result.contributions) == pytest.approx(result.margin) == pytest.approx(0.2)
    # s_a^T C s_b is -2 * 1/16 under the weights of A, and -2 * 0.2 * 0.8 / 10 under the other's.
    assert reward_covariance(A, other) == reward_covariance(other, A) == pytest.approx((-0.125 - 0.032) / 2)


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


@pytest.mark.parametrize("decoder", ["mlp", "film"])
def test_a_pair_under_a_network_has_the_moments_of_draws_with_one_weight_and_two_features(decoder):
    torch.manual_seed(0)
    head = VRMHead(8, 3, VRMHeadConfig(decoder=decoder, semantic_dims=4, decoder_hidden_size=16, inference_draws=4096))
    with torch.no_grad():
        for parameter in head.decoder.parameters():
            parameter.mul_(3.0)  # far from linear
        alpha = torch.tensor([[0.6, 1.2, 0.8]])
        mu, logvar = torch.tensor([[0.9, -0.4, 0.3, 1.1], [0.8, -0.2, 0.1, 1.0]]), torch.full((2, 4), -3.0)
        moments = sampled_reward_moments(head.decode, alpha.expand(2, 3), mu, logvar, draws=4096)
        n = 200_000
        weights = torch.distributions.Dirichlet(alpha[0]).sample((n,))
        chosen, rejected = (
            head.decode(weights, mu[i] + (0.5 * logvar[i]).exp() * torch.randn(n, 4)).double() for i in (0, 1)
        )
    a, b = (
        RewardScore(mean=m, std=v**0.5, objective_weights=(), objective_scores=(), deviations=tuple(d))
        for m, v, d in zip(*(field.tolist() for field in moments), strict=True)
    )
    brute_force = (chosen - rejected).var().item()
    assert compare_rewards(a, b).margin_std ** 2 == pytest.approx(brute_force, rel=0.1)
    assert compare_rewards(a, b).margin == pytest.approx(
        (chosen - rejected).mean().item(), abs=4 * (brute_force / 4096) ** 0.5
    )
    assert a.std**2 + b.std**2 > 1.5 * brute_force  # as if the responses had weights of their own
    shared_noise = sum((x - y) ** 2 for x, y in zip(a.deviations, b.deviations, strict=True)) / 2
    assert shared_noise < 0.8 * brute_force  # as if they had features of one noise


def test_an_ensemble_doubts_a_pair_as_much_as_its_members_disagree_on_it():
    # Members reward the pair (1, 0), (2, 3), (6, 3): margins 1, -1, 3.
    head = EnsembleHead(2, EnsembleConfig(members=3))
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 3.0], [6.0, 3.0]]))
        a, b = reward_scores(head(torch.eye(2), torch.eye(2), None))
    assert compare_rewards(a, b).margin == pytest.approx(1.0)
    assert compare_rewards(a, b).margin_std ** 2 == pytest.approx((0 + 4 + 4) / 3)
    assert compare_rewards(a, a).margin_std == pytest.approx(0.0, abs=5e-3)


def test_rewards_that_are_no_sum_over_objectives_are_compared_without_reasons():
    network = [
        RewardScore(
            mean=m, std=math.sqrt(4 / math.pi), objective_weights=(0.5, 0.5), objective_scores=(), concentration=9
        )
        for m in (2.0, 0.0)
    ]
    result = compare_rewards(*network)
    # Variance 8/pi in all: the margin is divided by sqrt(2).
    assert result.probability == pytest.approx(1 / (1 + math.exp(-math.sqrt(2.0))))
    assert (result.contributions, result.deciding) == ((), None)
