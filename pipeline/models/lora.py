"""Low-rank adapters on a decoder: trained instead of its weights, merged into them whenever it leaves the learner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.config.models import LoRAConfig
from pipeline.models.backbone_requirements import linear_layers

ADAPTER = "default"
BASE, LORA_A, LORA_B = "base_layer.weight", f"lora_A.{ADAPTER}.weight", f"lora_B.{ADAPTER}.weight"
"""Names of the tensors that an adapted layer has in place of its weight."""


def add_lora(model: PreTrainedModel, config: LoRAConfig | None, *, seed: int) -> None:
    """Freezes a decoder and adds adapters to its linear layers, in place; None leaves it as it is.

    W x + b  becomes  W x + b + (alpha / rank) B A x,  A [rank, in] random, B [out, rank] zero: the model starts as it
    was. A language-model head gets no adapter.

    Source: Hu et al. 2021, arXiv:2106.09685, Eq. 3.

    Args:
        model: a decoder, with or without language-model head.
        config: rank, alpha, dropout, and the names of the layers (`require_lora_targets`).
        seed: seed of A; equal on every rank.
    """
    if config is None:
        return
    # Imported here: peft takes a tenth of the start of a process, and most runs train without adapters.
    from peft import LoraConfig, inject_adapter_in_model

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
    """Inside the block the model computes what it did before `add_lora`, bit for bit."""
    layers = [layer for _, layer in _adapted_layers(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged_tensors(tensors: Iterable[tuple[str, torch.Tensor]], model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensor by tensor, the plain model that computes what the adapted one does: W + (alpha / rank) B A in place of W.

    The sum is made in float32 and rounded once to the dtype of W. The model itself keeps its adapters apart. Memory
    holds one tensor, and the parts of the layers that are not complete yet.

    Args:
        tensors: tensors of `model`, with their names.
        model: says where adapters are and how they are scaled; without any, `tensors` pass as they are.
    """
    layers = dict(_adapted_layers(model))
    parts = {f"{name}.{part}": (name, part) for name in layers for part in (BASE, LORA_A, LORA_B)}
    biases = {f"{name}.base_layer.bias": f"{name}.bias" for name in layers}
    waiting: dict[str, dict[str, torch.Tensor]] = {name: {} for name in layers}
    for name, tensor in tensors:
        if name not in parts:
            yield biases.get(name, name), tensor
            continue
        layer, part = parts[name]
        waiting[layer][part] = tensor
        if len(waiting[layer]) == 3:
            complete = waiting.pop(layer)
            base = complete[BASE]
            merged = complete[LORA_B].float() @ complete[LORA_A].float()
            # In place: of a language-model head, each further copy is the largest tensor of all.
            merged.mul_(layers[layer].scaling[ADAPTER]).add_(base)
            yield f"{layer}.weight", merged.to(base.dtype)


def _adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, layer) of every layer with adapters; only peft's `LoraLayer` has the attribute `lora_A`."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]
