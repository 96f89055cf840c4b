"""What lies in a vLLM model, against the published policy it should hold, and put there without vLLM's loader."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""vLLM's fused projections and the published parameters they are made of, in order."""
ROUNDING = 32
"""Units in the last place by which two ways to compute one matrix product may differ, relative to its largest entry."""

Published = Mapping[str, torch.Tensor]


def differences(model: torch.nn.Module, published: Published) -> dict[str, float]:
    """Parameter group -> largest relative difference from what was published, for groups that differ.

    Relative to the group's largest published value. A CPU engine keeps its matrices packed and drops the originals,
    so every matrix is also compared by what it does to a fixed vector; that sees stale copies, too. Knows vLLM's
    fused projections; a parameter that vLLM renamed otherwise is left out.
    """
    found: dict[str, float] = {}
    for module, name, parameter, parts in _parameters(model, published):
        if not published.keys() >= {*parts}:
            continue
        expected = _joined([published[part] for part in parts]).to(parameter)
        gap = 0.0
        if parameter.shape[1:] == expected.shape[1:]:
            # vLLM pads the vocabulary to a multiple of 64 rows.
            gap = _relative_gap(parameter.detach()[: len(expected)], expected)
        if isinstance(module, LinearBase | ParallelLMHead) and name.endswith(".weight"):
            gap = max(gap, _product_gap(module, expected))
        if gap > 0:
            group = ".".join(name.split(".")[:4])
            found[group] = max(gap, found.get(group, 0.0))
    return found


def holds_by_name(model: torch.nn.Module, published: Published) -> bool:
    """Whether every parameter is, as it stands, the published ones of its name: then `replace_weights` may be used."""
    # AMD's library for CPUs may go on using a matrix where it was published.
    covered = all(published.keys() >= {*parts} for _, _, _, parts in _parameters(model, published))
    return covered and not current_platform.is_zen_cpu() and not differences(model, published)


def replace_weights(model: torch.nn.Module, published: Published) -> None:
    """Gives every parameter of a CPU engine what was published, as vLLM's loader does, in half of its time.

    A matrix that the engine keeps in oneDNN's layout is packed from where it was published, without a copy between.

    Args:
        published: names, shapes and dtypes of a policy that vLLM loaded and of which `holds_by_name` was true.
    """
    lent: list[tuple[torch.nn.Module, str]] = []
    with torch.no_grad():
        for module, name, parameter, parts in [*_parameters(model, published)]:
            values = _joined([published[part] for part in parts])
            if parameter.numel() > 0:
                parameter[: len(values)].copy_(values)
            else:
                lent.append((module, name.rsplit(".", 1)[1]))
                setattr(*lent[-1], _parameter(values.to(parameter.dtype)))
    # vLLM packs the table of embeddings as well, for models that multiply by it for want of an lm_head.
    heads = any(isinstance(module, ParallelLMHead) for module in model.modules())
    for module in model.modules():
        if hasattr(module, "cpu_linear") and not (heads and type(module) is VocabParallelEmbedding):
            module.quant_method.process_weights_after_loading(module)
    for module, name in lent:
        if (kept := getattr(module, name)).numel() > 0:
            # Packing failed, and vLLM goes on with the matrix as it is: in a file that will be written over.
            setattr(module, name, _parameter(kept.detach().clone()))


def _parameters(
    model: torch.nn.Module, published: Published
) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Parameter, tuple[str, ...]]]:
    """Module, full name, parameter and the names under which it was published, in parts."""
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            yield module, name, parameter, (name,) if name in published else _parts(name)


def _parts(name: str) -> tuple[str, ...]:
    """Of a parameter that vLLM fuses, such as "...qkv_proj.weight"; any other is its own."""
    for fused, parts in FUSED.items():
        if f".{fused}." in name:
            return tuple(name.replace(fused, part) for part in parts)
    return (name,)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Their rows, one part after another; a view where that is how they lie in the file."""
    first, *_ = parts
    if all(before.data_ptr() + before.nbytes == after.data_ptr() for before, after in pairwise(parts)):
        return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
    return torch.cat([*parts])


def _parameter(values: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(values, requires_grad=False)


def _relative_gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    largest = theirs.float().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return ((ours.float() - theirs.float()).abs().max() / largest).item()


def _product_gap(layer: LinearBase | ParallelLMHead, weight: torch.Tensor) -> float:
    """Relative difference between what the layer computes and what `weight` [out, in] would; 0 within rounding."""
    inputs = layer.input_size if isinstance(layer, LinearBase) else layer.embedding_dim
    if weight.shape[1:] != (inputs,):
        return math.inf  # published transposed, as GPT-2 is; the product would read beyond the vector
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(1, weight.shape[1], generator=generator).to(weight)
    ours = layer.quant_method.apply(layer, vector)[:, : len(weight)]
    gap = _relative_gap(ours, vector @ weight.T)
    return gap if gap > ROUNDING * torch.finfo(weight.dtype).eps else 0.0
