"""Group advantages, ratios, surrogates and averages: by hand."""

import math

import pytest
import torch

from pipeline.errors import ShapeError
from pipeline.objectives.advantages import (
    group_centred,
    group_zscores,
    leave_one_out,
    overlong_penalty,
    rewards_to_go,
    uniform_groups,
)
from pipeline.objectives.aggregation import MiniBatchSize, fixed_length_mean, sequence_mean, token_mean
from pipeline.objectives.policy import (
    bounded_weights,
    cispo_surrogate,
    clipped_surrogate,
    clipped_tokens,
    geometric_mean_ratio,
    importance_ratio,
    product_ratio,
    truncated_importance_weights,
)

REWARDS = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]])


def test_grpo_divides_the_distance_to_the_group_mean_by_the_group_deviation():
    # mean 3, deviations (-2, -1, 0, 3), Bessel variance 14 / 3
    sd = math.sqrt(14 / 3)
    torch.testing.assert_close(group_zscores(REWARDS[:1], eps=0.0), torch.tensor([[-2 / sd, -1 / sd, 0.0, 3 / sd]]))
    # eps is added to the deviation sqrt(2), not to the variance
    torch.testing.assert_close(
        group_zscores(torch.tensor([[0.0, 2.0]]), eps=1.0), torch.tensor([[-1.0, 1.0]]) / (math.sqrt(2) + 1)
    )
    assert group_zscores(REWARDS)[1].tolist() == [0.0] * 4


def test_dr_grpo_only_centres():
    assert group_centred(REWARDS).tolist() == [[-2.0, -1.0, 0.0, 3.0], [0.0] * 4]


def test_rloo_compares_with_the_mean_of_the_others():
    # others of 1: (2 + 3 + 6) / 3 = 11/3
    expected = torch.tensor([[1 - 11 / 3, 2 - 10 / 3, 3 - 3.0, 6 - 2.0], [0.0] * 4])
    torch.testing.assert_close(leave_one_out(REWARDS), expected)


def test_the_rloo_baseline_is_dr_grpo_stretched_by_g_over_g_minus_one():
    torch.testing.assert_close(leave_one_out(REWARDS), group_centred(REWARDS) * 4 / 3)


@pytest.mark.parametrize("estimate", [group_zscores, group_centred, leave_one_out])
def test_one_response_is_no_group(estimate):
    with pytest.raises(ShapeError, match=r"samples >= 2\], got \[3, 1\]"):
        estimate(torch.zeros(3, 1))


def test_a_group_is_uniform_when_all_its_rewards_are_equal():
    assert uniform_groups(REWARDS).tolist() == [False, True]


def test_reinforce_sums_the_rewards_still_to_come():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [3.0, 8.0, 99.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    # row 0: 4;  2 + .5 * 4 = 4;  1 + .5 * 4 = 3.   row 1: 8;  3 + .5 * 8 = 7
    assert rewards_to_go(rewards, mask, gamma=0.5).tolist() == [[3.0, 4.0, 4.0], [7.0, 8.0, 0.0]]


def test_the_overlong_penalty_falls_through_the_buffer_to_minus_one():
    lengths = torch.tensor([10, 80, 85, 90, 100, 120])
    penalty = overlong_penalty(lengths, max_tokens=100, buffer_tokens=20)
    assert penalty.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


OLD = torch.zeros(2, 3)
NEW = torch.tensor([[math.log(2.0), math.log(4.0), 9.0], [math.log(0.5), 9.0, 9.0]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_ratios_per_token_per_response_and_their_geometric_mean():
    torch.testing.assert_close(importance_ratio(NEW, OLD, MASK), torch.tensor([[2.0, 4.0, 1.0], [0.5, 1.0, 1.0]]))
    # sqrt(2 * 4) = 2.8284
    root = math.sqrt(8)
    torch.testing.assert_close(geometric_mean_ratio(NEW, OLD, MASK), torch.tensor([[root] * 3, [0.5] * 3]))
    torch.testing.assert_close(product_ratio(NEW, OLD, MASK), torch.tensor([[8.0] * 3, [0.5] * 3]))


def test_the_ratio_of_a_long_response_stays_finite_with_its_gradient():
    new = torch.full((1, 1000), 1.0, requires_grad=True)
    everywhere = torch.ones(1, 1000, dtype=torch.bool)
    ratio = product_ratio(new, torch.zeros(1, 1000), everywhere)
    clipped_surrogate(ratio, -torch.ones(1, 1000), clip_low=0.2, clip_high=0.2).sum().backward()
    assert ratio.max().item() == pytest.approx(math.exp(20.0))
    assert new.grad.abs().max() == 0.0


def test_clip_higher_leaves_more_room_above_than_below():
    ratio = torch.tensor([[1.25, 1.5, 0.5, 0.5]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, 1.0]])
    # 1.25 is within 1.28; 1.5 -> 1.28; min(-.5, -.8) = -.8; min(.5, .8) = .5
    surrogate = clipped_surrogate(ratio, advantages, clip_low=0.2, clip_high=0.28)
    torch.testing.assert_close(surrogate, torch.tensor([[1.25, 1.28, -0.8, 0.5]]))
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    assert clipped_tokens(ratio, advantages, everywhere, clip_range=0.2, clip_high=0.28).item() == 2


def test_the_dual_clip_bounds_the_loss_of_a_bad_token_that_became_likely():
    ratio = torch.tensor([[10.0, 2.0, 10.0]], requires_grad=True)
    advantages = torch.tensor([[-1.0, -1.0, 1.0]])
    surrogate = clipped_surrogate(ratio, advantages, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    torch.testing.assert_close(surrogate, torch.tensor([[-3.0, -2.0, 1.2]]))
    surrogate.sum().backward()
    assert ratio.grad.tolist() == [[0.0, -1.0, 0.0]]
    everywhere = torch.ones(1, 3, dtype=torch.bool)
    assert clipped_tokens(ratio.detach(), advantages, everywhere, clip_range=0.2, dual_clip=3.0).item() == 2


def test_cispo_bounds_the_weight_and_keeps_the_gradient():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    ratio = importance_ratio(logprobs, torch.tensor([[-3.0, -2.0, -1.0]]), torch.ones(1, 3, dtype=torch.bool))
    advantages = torch.tensor([[1.0, 2.0, -1.0]])
    # ratios e^2 -> 5, 1, e^-2 = .1353
    surrogate = cispo_surrogate(ratio, logprobs, advantages, clip_low=1.0, clip_high=4.0)
    torch.testing.assert_close(surrogate, torch.tensor([[-5.0, -4.0, 3 * math.exp(-2)]]))
    surrogate.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[5.0, 2.0, -math.exp(-2)]]))
    everywhere = torch.ones(1, 3, dtype=torch.bool)
    assert bounded_weights(ratio, everywhere, clip_low=1.0, clip_high=4.0).item() == 1


def test_importance_weights_are_cut_above_only():
    learner = torch.tensor([[math.log(0.5), math.log(0.9), math.log(0.1), 7.0]])
    engine = torch.tensor([[math.log(0.5), math.log(0.3), math.log(0.4), 0.0]])
    mask = torch.tensor([[True, True, True, False]])
    weights = truncated_importance_weights(learner, engine, mask, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 2.0, 0.25, 1.0]]))


def test_three_ways_to_average():
    x = torch.tensor([[1.0, 3.0, 5.0], [7.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    size = MiniBatchSize(num_tokens=4, num_responses=2, max_response_tokens=10)
    assert token_mean(x, mask, size).item() == 16 / 4
    assert sequence_mean(x, mask, size).item() == (3 + 7) / 2
    assert fixed_length_mean(x, mask, size).item() == pytest.approx(16 / 20)


@pytest.mark.parametrize("average", [token_mean, sequence_mean, fixed_length_mean])
def test_averages_of_shards_add_up(average):
    x = torch.arange(12.0).view(4, 3)
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False], [True, True, True]])
    size = MiniBatchSize(num_tokens=9, num_responses=4, max_response_tokens=3)
    whole = average(x, mask, size)
    torch.testing.assert_close(average(x[:1], mask[:1], size) + average(x[1:], mask[1:], size), whole)
    assert whole.item() > 0


def test_averages_ignore_not_a_number_in_the_padding():
    x = torch.tensor([[2.0, float("nan")]])
    mask = torch.tensor([[True, False]])
    size = MiniBatchSize(num_tokens=1, num_responses=1, max_response_tokens=2)
    assert [f(x, mask, size).item() for f in (token_mean, sequence_mean, fixed_length_mean)] == [2.0, 2.0, 1.0]
