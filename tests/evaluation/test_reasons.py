"""Fidelity of objective scores, on pairs small enough to work out by hand."""

import math

import pytest
import torch

from pipeline.evaluation.reasons import reason_fidelity, score_collinearity, verified_objectives


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
