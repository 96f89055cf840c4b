"""The decoders that are networks, with one number in every place."""

import math

import pytest
import torch

from pipeline.models.reward_decoders import FiLMDecoder, MLPDecoder


def silu(x):
    return x / (1 + math.exp(-x))


def with_parameters(decoder, **values):
    decoder.load_state_dict({name.replace("__", "."): torch.tensor(value) for name, value in values.items()})
    return decoder


def test_mlp_by_hand():
    decoder = with_parameters(
        MLPDecoder(1, 1, 1),
        first__weight=[[2.0, -1.0]],
        first__bias=[0.5],
        second__weight=[[3.0]],
        second__bias=[-1.0],
        output__weight=[[4.0]],
    )
    # [w; z] = (.5, 2): 2 * .5 - 2 + .5 = -.5
    reward = decoder(torch.tensor([[0.5]]), torch.tensor([[2.0]]))
    assert reward.tolist() == [pytest.approx(4 * silu(3 * silu(-0.5) - 1))]


def test_film_by_hand():
    decoder = with_parameters(
        FiLMDecoder(1, 1, 2),
        features__weight=[[1.0], [-2.0]],
        modulation__weight=[[2.0], [-4.0]],
        output__weight=[[3.0, 5.0]],
    )
    # units (1 * z)(1 + 2 w) and (-2 z)(1 - 4 w) at w = .5, z = 2: 4 and 4
    reward = decoder(torch.tensor([[0.5]]), torch.tensor([[2.0]]))
    assert reward.tolist() == [pytest.approx(3 * silu(4.0) + 5 * silu(4.0))]


def test_without_features_film_says_nothing_whatever_the_weights():
    decoder = FiLMDecoder(4, 3, 8)
    assert decoder(torch.rand(5, 4), torch.zeros(5, 3)).tolist() == [0.0] * 5


@pytest.mark.parametrize("kind", [MLPDecoder, FiLMDecoder])
def test_leading_dimensions_are_free(kind):
    torch.manual_seed(0)
    decoder = kind(4, 3, 8)
    weights, features = torch.rand(5, 2, 4), torch.randn(5, 2, 3)
    rewards = decoder(weights, features)
    assert rewards.shape == (5, 2)
    torch.testing.assert_close(rewards[3, 1], decoder(weights[3, 1], features[3, 1]))
