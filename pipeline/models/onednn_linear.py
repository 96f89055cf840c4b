"""Linear layers that multiply with oneDNN on a CPU.

PyTorch gives float32 products to MKL, which uses its widest vector instructions only on processors of its own maker.
On others oneDNN is about twice as fast. Every build of PyTorch carries oneDNN, for narrower types.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

Module = TypeVar("Module", bound=nn.Module)


class OneDNNLinear(nn.Linear):
    """y = x W^T + b, with oneDNN where x is float32 on a CPU; in every other way the layer it was."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or not x.numel():
            return F.linear(x, self.weight, self.bias)
        y: torch.Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return y.view(*x.shape[:-1], y.shape[-1])


def with_onednn(model: Module) -> Module:
    """The same model, parameters and names; its plain linear layers multiply with oneDNN where PyTorch has it."""
    if torch.backends.mkldnn.is_available():
        for module in model.modules():
            if type(module) is nn.Linear and module.weight.dtype == torch.float32:
                module.__class__ = OneDNNLinear
    return model


class _Linear(torch.autograd.Function):
    """With G the gradient of y = x W^T + b:  dx = G W,  dW = G^T x,  db = the sum of G's rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [gradient], (x, weight) = gradients, ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _product(gradient, weight.t()) if needs_x else None,
            _product(gradient.t(), x.t()) if needs_weight else None,
            gradient.sum(0) if needs_bias else None,
        )


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
