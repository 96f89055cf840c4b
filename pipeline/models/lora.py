"""Low-rank adapters on a decoder: trained instead of its weights, merged into them whenever it leaves the learner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from pipeline.config.schema import LoRAConfig
from pipeline.models.suitability import linear_layers

ADAPTER = "default"


def add_lora(model: PreTrainedModel, config: LoRAConfig | None, *, seed: int) -> None:
    """Freezes a decoder and adds adapters beside its linear layers, in place; None leaves it as it is.

    W x + b  becomes  W x + b + (alpha / rank) B A x,  A [rank, in] random, B [out, rank] zero: the model starts as it
    was. A language-model head gets no adapter.

    Source: Hu et al. 2021, arXiv:2106.09685, Eq. 3.

    Args:
        model: a decoder, with or without language-model head.
        config: rank, alpha, dropout, and the names of the layers (`require_lora_targets`).
        seed: of A; equal on every rank.
    """
    if config is None:
        return
    model.requires_grad_(False)
    peft_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets or linear_layers(model.base_model)),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(peft_config, model.base_model, adapter_name=ADAPTER)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it the model computes what it did before `add_lora`, bit for bit."""
    layers = [layer for _, layer in _adapted_layers(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The plain model that computes what the adapted one does: W + (alpha / rank) B A under the name of W.

    The sum is made in float32 and rounded once to the dtype of W. The model itself keeps its adapters apart.

    Args:
        state: all tensors of `model`, or none, as on the ranks that hold no copy; unchanged.
        model: says where adapters are and how they are scaled; without any, the result is `state`.
    """
    plain = dict(state)
    for name, layer in _adapted_layers(model) if state else ():
        a, b = (plain.pop(f"{name}.lora_{part}.{ADAPTER}.weight").float() for part in "AB")
        weight = plain.pop(f"{name}.base_layer.weight")
        plain[f"{name}.weight"] = (weight.float() + layer.scaling[ADAPTER] * (b @ a)).to(weight.dtype)
        if layer.base_layer.bias is not None:
            plain[f"{name}.bias"] = plain.pop(f"{name}.base_layer.bias")
    return plain


def _adapted_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
