"""Fidelity of objective scores, on pairs small enough to work out by hand."""

import math

import pytest
import torch

from pipeline.evaluation.reasons import (
    SummedRewards,
    agreement_with_truth,
    mean_margin_contributions,
    reason_fidelity,
    score_collinearity,
    verified_objectives,
)
from pipeline.records import ObjectiveTruth


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def test_scores_that_vary_apart_are_not_collinear():
    apart = double([[1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [-1.0, -1.0, 0.0]])
    assert score_collinearity(apart) == 0.0
    apart[:, 2] = apart[:, 0]
    assert score_collinearity(apart) == pytest.approx(1 / 3)  # one of three pairs


def test_fidelity_counts_the_pairs_that_the_annotator_orders():
    # Four pairs, chosen rows first. Honesty is annotated everywhere; the third pair is a tie, the fourth is misordered.
    scores = double([[2.0], [1.0], [0.0], [0.0], [1.0], [1.0], [5.0], [3.0]])
    annotated = double([[4.0], [3.0], [2.0], [5.0], [1.0], [2.0], [2.0], [1.0]])
    metrics = reason_fidelity(
        torch.cat([scores, -scores], 1),
        torch.cat([annotated, torch.zeros_like(annotated)], 1),
        torch.tensor([[True, False]] * 8),
        ("honesty", "safety"),
    )
    # Ordered pairs 1, 2 and 4: right, a tie of the scores, wrong.
    assert metrics["reasons/honesty/pair_accuracy"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert metrics["reasons/honesty/pairs"] == 3
    x, y = [2, 1, 0, 0, 1, 1, 5, 3], [4, 3, 2, 5, 1, 2, 2, 1]
    mean_x, mean_y = sum(x) / 8, sum(y) / 8
    product = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    norms = math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))
    assert metrics["reasons/honesty/correlation"] == pytest.approx(product / norms)
    assert metrics["reasons/collinearity"] == pytest.approx(1.0)
    assert not [name for name in metrics if "safety" in name]  # nobody annotated it


def test_a_head_without_scores_has_no_reasons():
    nothing = torch.zeros(2, 0)
    assert reason_fidelity(nothing, torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool), ("a", "b")) == {}


@pytest.mark.parametrize(
    ("pair_accuracy", "pairs", "verified"), [(0.65, 30.0, ("safety",)), (0.64, 30.0, ()), (0.9, 29.0, ())]
)
def test_an_objective_is_verified_by_enough_pairs_ordered_right(pair_accuracy, pairs, verified):
    metrics = {"reasons/safety/pair_accuracy": pair_accuracy, "reasons/safety/pairs": pairs}
    assert verified_objectives(metrics, ("honesty", "safety")) == verified


def test_contributions_to_the_mean_margin_stand_beside_those_of_the_annotations():
    # Two pairs, chosen rows first. Only the first pair is annotated on both sides.
    rewards = SummedRewards(
        weights=double([[0.5, 0.5], [0.9, 0.1], [0.5, 0.5], [0.9, 0.1]]),
        scores=double([[4.0, 1.0], [9.0, 9.0], [1.0, 2.0], [0.0, 0.0]]),
    )
    annotated = double([[3.0, 0.0], [9.0, 0.0], [2.0, 0.0], [7.0, 0.0]])
    mask = torch.tensor([[True, False], [True, False], [True, False], [False, False]])
    assert mean_margin_contributions(rewards, annotated, mask, ("honesty", "safety")) == {
        "reasons/honesty/contribution": 0.5 * (4 - 1),
        "reasons/honesty/contribution_by_annotations": 0.5 * (3 - 2),
    }


def test_a_named_reason_is_right_where_the_truth_prefers_the_same_response_for_the_same_reason():
    # Contributions to the margin, (honesty, safety): (2, 1), (-1, -3), (1, 2), (3, 1). Weights are 1/2 throughout.
    rewards = SummedRewards(
        weights=torch.full((8, 2), 0.5, dtype=torch.float64),
        scores=double([[4.0, 2.0], [-2.0, -6.0], [2.0, 4.0], [6.0, 2.0], *[[0.0, 0.0]] * 4]),
    )
    truth = ObjectiveTruth(
        weights=double([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]),
        # Honesty decided; the chosen response was better; safety decided; both added the same.
        scores=double([[3.0, 1.0], [2.0, 0.0], [0.0, 3.0], [1.0, 1.0], *[[0.0, 0.0]] * 4]),
    )
    metrics = agreement_with_truth(rewards, truth, ("honesty", "safety"), ("honesty", "safety"))
    assert metrics["reasons/decisive_pairs"] == 4
    assert metrics["reasons/decisive_accuracy"] == 3 / 4
    assert metrics["reasons/weight_correlation"] == 0.0  # nothing varies
    # Safety is not verified, so pairs 2 and 3 get no reason.
    only_honesty = agreement_with_truth(rewards, truth, ("honesty", "safety"), ("honesty",))
    assert (only_honesty["reasons/decisive_pairs"], only_honesty["reasons/decisive_accuracy"]) == (2.0, 1.0)
    nothing = agreement_with_truth(rewards, truth, ("honesty", "safety"), ())
    assert "reasons/decisive_accuracy" not in nothing


def test_the_correlation_of_weights_is_over_all_prompts_and_objectives():
    rewards = SummedRewards(weights=double([[0.7, 0.3], [0.2, 0.8]] * 2), scores=torch.zeros(4, 2))
    truth = ObjectiveTruth(weights=double([[0.9, 0.1], [0.1, 0.9]]), scores=torch.zeros(4, 2))
    metrics = agreement_with_truth(rewards, truth, ("honesty", "safety"), ())
    # Deviations (.2, -.2, -.3, .3) and (.4, -.4, -.4, .4).
    assert metrics["reasons/weight_correlation"] == pytest.approx(0.4 / (0.26 * 0.64) ** 0.5)
    assert metrics["reasons/decisive_pairs"] == 0.0  # no response is preferred
