"""The Laplace approximation of the last maps against Hessians worked out by hand."""

import math

import pytest
import torch

from pipeline.objectives.last_layer import (
    SKETCH_SIZE,
    LastLayerInputs,
    Precision,
    bradley_terry_precision,
    last_layer_gradient,
    relative_to,
    sketched,
    unsketched_draws,
)

NOTHING = torch.zeros(2, 0, dtype=torch.float64)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def test_a_logistic_model_of_one_weight_by_hand():
    """r = w x with w = ln 3: margins ln 3 and 2 ln 3 give p (1 - p) = 3/16 and 9/100."""
    x = double([[1.0], [2.0]])
    matrix = bradley_terry_precision(x, math.log(3.0) * x.squeeze(1))
    assert matrix.item() == pytest.approx(3 / 16 + 4 * 9 / 100)
    # With a prior precision of 1/2: the variance of the margin of x = 3 is 9 / (H + 1/2).
    draws = Precision.of(matrix).draws(0.5, count=100_000)
    assert (3.0 * draws).square().sum().item() == pytest.approx(9 / (3 / 16 + 0.36 + 0.5), rel=0.02)


def test_the_precision_is_the_hessian_of_the_likelihood():
    """For a linear reward the Gauss-Newton matrix is the Hessian itself, here by automatic differentiation."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    w = torch.randn(3, generator=generator, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda v: torch.nn.functional.softplus(-x @ v).sum(), w)
    torch.testing.assert_close(bradley_terry_precision(x, x @ w), hessian)


def test_the_gradient_is_that_of_the_gated_reward():
    """r = sum_k softmax(V chi)_k (W phi)_k, against automatic differentiation in W and V."""
    generator = torch.Generator().manual_seed(1)
    phi, chi = torch.randn(1, 5, generator=generator), torch.randn(1, 4, generator=generator)
    maps = torch.randn(3, 5, generator=generator), torch.randn(3, 4, generator=generator)

    def reward(scores_map, weights_map):
        return (torch.softmax(chi @ weights_map.T, dim=-1) * (phi @ scores_map.T)).sum()

    expected = torch.cat([g.flatten() for g in torch.autograd.functional.jacobian(reward, maps)])
    weights = torch.softmax(chi @ maps[1].T, dim=-1)
    gradient = last_layer_gradient(LastLayerInputs(weights, phi @ maps[0].T, chi, phi))
    torch.testing.assert_close(gradient[0], expected)


def test_without_objectives_the_gradient_is_the_features():
    features = double([[1.0, 2.0], [3.0, 4.0]])
    assert last_layer_gradient(LastLayerInputs(NOTHING, NOTHING, NOTHING, features)) is features


def test_the_reference_response_has_no_error_bar_of_its_own():
    inputs = LastLayerInputs(double([[0.5, 0.5]]), double([[1.0, 3.0]]), double([[2.0]]), double([[4.0, 5.0]]))
    itself = relative_to(inputs, inputs.response_features[0], inputs.scores[0])
    assert last_layer_gradient(itself).abs().max().item() == 0.0


def test_the_reference_cancels_in_a_pair():
    weights, chi = double([[0.2, 0.8]]).expand(2, 2), double([[1.0, -2.0]]).expand(2, 2)
    inputs = LastLayerInputs(weights, double([[1.0, 3.0], [0.5, -1.0]]), chi, double([[4.0], [7.0]]))
    moved = relative_to(inputs, double([11.0]), double([5.0, -3.0]))
    plain, relative = last_layer_gradient(inputs), last_layer_gradient(moved)
    torch.testing.assert_close(plain[0] - plain[1], relative[0] - relative[1])


def test_draws_have_the_covariance_of_the_posterior():
    matrix = double([[2.0, 0.5], [0.5, 1.0]])
    draws = Precision.of(matrix).draws(0.5, count=200_000)
    torch.testing.assert_close(draws @ draws.T, torch.linalg.inv(matrix + 0.5 * torch.eye(2)), atol=0.01, rtol=0)


def test_draws_of_sketched_maps_read_whole_features():
    """A draw over the sketch, taken back, gives the reward of whole features that the sketch has of sketched ones."""
    generator = torch.Generator().manual_seed(2)
    size = SKETCH_SIZE  # for two objectives a map keeps a quarter of it
    weights = torch.softmax(torch.randn(3, 2, generator=generator), dim=-1)
    scores = torch.randn(3, 2, generator=generator)
    chi, phi = torch.randn(3, size, generator=generator), torch.randn(3, size, generator=generator)
    inputs = LastLayerInputs(weights, scores, chi, phi)
    small = last_layer_gradient(sketched(inputs))
    assert small.shape == (3, SKETCH_SIZE)
    draws = torch.randn(SKETCH_SIZE, 7, generator=generator)
    torch.testing.assert_close(
        last_layer_gradient(inputs) @ unsketched_draws(draws, inputs), small @ draws, atol=1e-3, rtol=1e-4
    )
