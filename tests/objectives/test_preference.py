"""Likelihoods of a comparison, by hand and by what they must add up to."""

import math

import pytest
import torch

from pipeline.objectives.preference import (
    bradley_terry_loss,
    margin_loss,
    scaled_loss,
    score_error,
    tie_loss,
)

LN3 = math.log(3.0)  # sigmoid(ln 3) = 3/4
UNKNOWN = math.nan


def losses(loss, margins, annotated, **settings):
    return loss(torch.tensor(margins), torch.tensor(annotated), **settings).tolist()


def test_bradley_terry_by_hand():
    assert bradley_terry_loss(torch.tensor([LN3, -LN3, 0.0])).tolist() == pytest.approx(
        [-math.log(3 / 4), -math.log(1 / 4), math.log(2)]
    )


def test_label_smoothing_mixes_both_outcomes_and_bounds_the_margin():
    smooth = bradley_terry_loss(torch.tensor([LN3]), label_smoothing=0.1).item()
    assert smooth == pytest.approx(-0.9 * math.log(3 / 4) - 0.1 * math.log(1 / 4))
    # The best margin is the log-odds of a right label: ln(.9 / .1).
    margins = torch.tensor([math.log(9.0)], requires_grad=True)
    bradley_terry_loss(margins, label_smoothing=0.1).sum().backward()
    assert margins.grad.item() == pytest.approx(0.0, abs=1e-6)


def test_a_margin_has_to_be_won_and_an_unknown_one_does_not():
    assert losses(margin_loss, [LN3 + 1.0, LN3], [2.0, UNKNOWN], scale=0.5) == pytest.approx([-math.log(3 / 4)] * 2)


def test_a_scaled_pair_counts_by_its_margin_and_one_of_unknown_margin_once():
    plain = -math.log(3 / 4)
    assert losses(scaled_loss, [LN3] * 3, [3.0, 0.0, UNKNOWN], scale=0.5) == pytest.approx([1.5 * plain, 0.0, plain])


@pytest.mark.parametrize("difference", [-2.0, 0.0, 0.7, 30.0])
@pytest.mark.parametrize("threshold", [0.1, 1.5])
def test_win_tie_and_loss_have_probability_one_together(difference, threshold):
    win, tie, loss = losses(tie_loss, [difference, difference, -difference], [1.0, 0.0, UNKNOWN], threshold=threshold)
    assert math.exp(-win) + math.exp(-tie) + math.exp(-loss) == pytest.approx(1.0, abs=1e-6)


def test_equal_rewards_tie_with_the_probability_of_rao_and_kupper():
    # theta = e^eta = 2: P(win) = 1 / (1 + 2), so a third is left for the tie
    win, tie = losses(tie_loss, [0.0, 0.0], [1.0, 0.0], threshold=math.log(2.0))
    assert (math.exp(-win), math.exp(-tie)) == (pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_a_tie_pulls_two_rewards_together():
    margins = torch.tensor([1.0, -1.0], requires_grad=True)
    tie_loss(margins, torch.zeros(2), threshold=0.5).sum().backward()
    assert margins.grad[0] > 0 > margins.grad[1]


@pytest.mark.parametrize("loss", [lambda m, a: margin_loss(m, a, scale=1.0), lambda m, a: scaled_loss(m, a, scale=1.0)])
def test_an_unknown_margin_leaves_the_gradient_finite(loss):
    margins = torch.tensor([1.0, 2.0], requires_grad=True)
    loss(margins, torch.tensor([UNKNOWN, 1.0])).sum().backward()
    assert torch.isfinite(margins.grad).all()


def test_score_error_counts_annotated_scores_alone():
    scores, annotated = torch.tensor([[1.0, 5.0], [2.0, -1.0]]), torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    mask = torch.tensor([[True, False], [True, True]])
    assert score_error(scores, annotated, mask).tolist() == [4.0, 1.0 + 4.0]
