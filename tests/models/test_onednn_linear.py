"""Linear layers that multiply with oneDNN are the layers they were."""

import pytest
import torch
from torch import nn

from pipeline.models.onednn_linear import OneDNNLinear, with_onednn


def both_ways(layer, *shape, dtype=torch.float32):
    """Output and gradients of input, weight and bias, of the layer as it was and with oneDNN."""
    found = []
    for module in (layer, with_onednn(nn.Sequential(layer))[0]):
        layer.zero_grad()
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()
        y = module(x)
        (y * torch.arange(1.0, y.numel() + 1).view_as(y) / y.numel()).sum().backward()
        found.append([y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.requires_grad)])
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(33, 24), (1, 24), (2, 5, 24)], ids=str)
def test_outputs_and_gradients_are_those_of_torch(shape, bias):
    plain, fast = both_ways(nn.Linear(24, 40, bias=bias), *shape)
    assert len(plain) == 3 + bias
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


def test_a_product_by_hand():
    layer = with_onednn(nn.Sequential(nn.Linear(2, 2)))[0]
    layer.load_state_dict({"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "bias": torch.tensor([10.0, 20.0])})
    x = torch.tensor([[1.0, 1.0], [0.0, 2.0]], requires_grad=True)
    y = layer(x)
    assert isinstance(layer, OneDNNLinear)
    assert y.tolist() == [[13.0, 27.0], [14.0, 28.0]]
    y[1, 0].backward()
    assert x.grad.tolist() == [[0.0, 0.0], [1.0, 2.0]]
    assert layer.weight.grad.tolist() == [[0.0, 2.0], [0.0, 0.0]]
    assert layer.bias.grad.tolist() == [1.0, 0.0]


def test_frozen_weights_get_no_gradient():
    layer = nn.Linear(24, 40).requires_grad_(False)
    plain, fast = both_ways(layer, 7, 24)
    assert layer.weight.grad is None
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


def test_no_rows_and_autocast_go_the_old_way():
    layer = with_onednn(nn.Sequential(nn.Linear(24, 40)))[0]
    assert layer(torch.zeros(0, 24)).shape == (0, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.zeros(3, 24)).dtype == torch.bfloat16


def test_names_stay_and_subclasses_and_other_types_are_left_alone():
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({"plain": nn.Linear(2, 2), "own": Own(2, 2), "narrow": nn.Linear(2, 2).bfloat16()})
    names = [*model.state_dict()]
    kinds = {name: type(module) for name, module in with_onednn(model).items()}
    assert kinds == {"plain": OneDNNLinear, "own": Own, "narrow": nn.Linear}
    assert [*model.state_dict()] == names
