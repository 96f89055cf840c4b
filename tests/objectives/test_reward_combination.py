"""Several rewards as one, by hand."""

import pytest
import torch

from pipeline.errors import ShapeError
from pipeline.objectives.reward_combination import group_decoupled, weighted_sum


def test_a_sum_counts_each_source_in_units_of_its_held_out_spread():
    means = torch.tensor([[1.0, 10.0], [0.0, 30.0]])
    stds = torch.tensor([[0.5, 0.0], [0.3, 8.0]])
    sums, errors = weighted_sum(
        means,
        stds,
        torch.tensor([1.0, 2.0]),
        heldout_means=torch.tensor([0.5, 20.0]),
        heldout_stds=torch.tensor([0.5, 10.0]),
    )
    # (1 - .5) / .5 + 2 (10 - 20) / 10 = 1 - 2, and -1 + 2; errors .5 / .5, and |(.3 / .5, 2 * 8 / 10)| = |(.6, 1.6)|
    torch.testing.assert_close(sums, torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(errors, torch.tensor([1.0, (0.36 + 2.56) ** 0.5]))


def test_a_group_is_normalised_source_by_source_before_the_sum():
    # One group of three: the first source 0, 1, 2 (sd 1), the second 0, 0, 300 (mean 100, sd 173.2).
    means = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 300.0]])
    result = group_decoupled(means, torch.tensor([1.0, 0.5]), torch.tensor([0, 0, 0]), eps=0.0)
    second = 100 / 30000**0.5
    torch.testing.assert_close(result, torch.tensor([-1.0 - second / 2, -second / 2, 1.0 + second]))


def test_groups_need_not_be_neighbours_and_one_of_one_has_nothing_to_say():
    means = torch.tensor([[0.0], [5.0], [2.0]])
    result = group_decoupled(means, torch.tensor([1.0]), torch.tensor([0, 7, 0]), eps=0.0)
    torch.testing.assert_close(result, torch.tensor([-(0.5**0.5), 0.0, 0.5**0.5]))


def test_a_source_that_says_the_same_of_a_whole_group_adds_nothing():
    result = group_decoupled(torch.full((4, 1), 3.0), torch.tensor([9.0]), torch.tensor([0, 0, 1, 1]))
    assert result.tolist() == [0.0] * 4


def test_one_group_number_a_row():
    with pytest.raises(ShapeError, match=r"\[2\] group numbers for rewards of shape \[3, 1\]"):
        group_decoupled(torch.zeros(3, 1), torch.ones(1), torch.tensor([0, 0]))
