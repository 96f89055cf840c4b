"""The weights of a vLLM model: compared with the published policy, and replaced without vLLM's loader.

vLLM imports this file in every process of an engine, for `EngineShard`, and so learns of our weight transfers there.
A shard in a process of its own also learns there to end with the engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Protocol, cast

import torch
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform

from actors.process_end import end_with_the_parent
from actors.weight_transfer import register_all
from pipeline.learning.memory import copy_gb_per_s, resident_peak_gib
from pipeline.rollouts.policy_files import PolicyFiles

register_all()
# vLLM's shards notice the end of their engine in Python alone. In a collective operation, or while they start, they
# would go on for ever, and keep a processor busy, or a GPU. An actor's main thread starts them.
end_with_the_parent()

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""vLLM's fused projections and the published parameters they are made of, in order."""
ROUNDING = 32
"""Units in the last place by which two ways to compute one matrix product may differ, relative to its largest entry."""

FILES = PolicyFiles()
"""Of this process."""

Published = Mapping[str, torch.Tensor]
"""The tensors of a policy by their published names."""


class Worker(Protocol):
    """vLLM's worker, which the extension becomes a part of."""

    def get_model(self) -> torch.nn.Module:
        """This process's shard."""


class EngineShard:
    """Methods added to vLLM's worker. A location is the directory of a published policy."""

    def holds_published(self: Worker, location: str) -> bool:
        return holds_by_name(self.get_model(), FILES.read(location))

    def replace_by_published(self: Worker, location: str) -> None:
        replace_weights(self.get_model(), FILES.read(location))

    def pack_experts_again(self: Worker) -> None:
        forget_expert_kernels(self.get_model())

    def differing_groups(self: Worker, location: str) -> dict[str, float]:
        return differences(self.get_model(), FILES.read(location))

    def copy_speed(self: Worker, num_bytes: int) -> float:
        """GB/s of a copy in the memory that holds the weights."""
        return copy_gb_per_s(num_bytes, next(self.get_model().parameters()).device)

    def peak_gib(self) -> float:
        """The largest resident size of this process."""
        return resident_peak_gib()


def differences(model: torch.nn.Module, published: Published) -> dict[str, float]:
    """Parameter group -> largest relative difference from what was published, for groups that differ.

    Differences are relative to the group's largest published value. A CPU engine keeps its matrices packed and drops
    the originals. So every matrix is also compared by its product with a fixed vector, which shows stale copies too.
    vLLM's fused projections are taken apart; other parameters that vLLM renamed are left out. Of an engine with several
    shards, each compares what it holds.
    """
    found: dict[str, float] = {}
    for module, name, parameter, parts in _parameters(model, published):
        held = _held(module, parts, published)
        if held is None:
            continue
        expected = _joined(held).to(parameter)
        if expected.numel() == 0:
            continue  # the last shards of a small vocabulary hold padding alone
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
    """Whether every parameter equals what was published under its name, so that `replace_weights` may be used."""
    # AMD's library for CPUs may continue to use a matrix where it was published.
    covered = all(_held(module, parts, published) is not None for module, _, _, parts in _parameters(model, published))
    return covered and not current_platform.is_zen_cpu() and not differences(model, published)


def replace_weights(model: torch.nn.Module, published: Published) -> None:
    """Sets every parameter of a CPU engine to the published one, as vLLM's loader does, in half of the loader's time.

    A matrix that the engine keeps in oneDNN's layout is packed straight from the published file.

    Args:
        published: names, shapes and dtypes of a policy that vLLM loaded and of which `holds_by_name` was true.
    """
    borrowed: list[tuple[torch.nn.Module, str]] = []
    with torch.no_grad():
        for module, name, parameter, parts in [*_parameters(model, published)]:
            values = _joined(_held(module, parts, published) or [])
            if parameter.numel() > 0:
                parameter[: len(values)].copy_(values)
            else:
                # The engine dropped this matrix after packing it: lend it the published one, to pack again below.
                borrowed.append((module, name.rsplit(".", 1)[1]))
                setattr(*borrowed[-1], _parameter(values.to(parameter.dtype).contiguous()))
    # vLLM also packs the table of embeddings, for models that multiply by this table because they have no lm_head.
    heads = any(isinstance(module, ParallelLMHead) for module in model.modules())
    for module in model.modules():
        if hasattr(module, "cpu_linear") and not (heads and type(module) is VocabParallelEmbedding):
            # torch's type of a module's attributes is Tensor | Module; a layer with `cpu_linear` has this method.
            cast(QuantizeMethodBase, module.quant_method).process_weights_after_loading(module)
    for module, name in borrowed:
        if (kept := getattr(module, name)).numel() > 0:
            # Packing failed, so vLLM uses the matrix itself. The file behind it will be written over: copy it.
            setattr(module, name, _parameter(kept.detach().clone()))


def forget_expert_kernels(model: torch.nn.Module) -> None:
    """Lets vLLM's loader pack the experts of a mixture on a CPU as it did the first time.

    vLLM's CPU kernel reads packed experts, and vLLM packs them only where a layer has no kernel yet. Without this, the
    kernel of a layer with new experts reads them as if they were packed, and the layer computes something else.
    """
    for module in model.modules():
        if isinstance(method := getattr(module, "quant_method", None), UnquantizedFusedMoEMethod):
            method.moe_kernel = None


def _parameters(
    model: torch.nn.Module, published: Published
) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Parameter, tuple[str, ...]]]:
    """Module, full name, parameter and the names under which it was published, in parts."""
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            yield module, name, parameter, (name,) if name in published else _parts(name)


def _parts(name: str) -> tuple[str, ...]:
    """Published names of a parameter such as "...qkv_proj.weight", which vLLM fuses; others keep their own name."""
    for fused, parts in FUSED.items():
        if f".{fused}." in name:
            return tuple(name.replace(fused, part) for part in parts)
    return (name,)


def _held(module: torch.nn.Module, parts: Sequence[str], published: Published) -> list[torch.Tensor] | None:
    """What this shard holds of the published parts of a parameter, by vLLM's rules; None where they are not known.

    A shard has the rows of its heads in the projections before attention, its rows in the other first matrices, its
    columns in the second ones, and its part of the vocabulary. What is left is whole in every shard.
    """
    if not published.keys() >= {*parts}:
        return None
    tensors = [published[part] for part in parts]
    shards = getattr(module, "tp_size", 1)
    if shards == 1:
        return tensors
    if isinstance(module, VocabParallelEmbedding):
        mine = module.shard_indices
        return [tensor[mine.org_vocab_start_index : mine.org_vocab_end_index] for tensor in tensors]
    if isinstance(module, RowParallelLinear):
        return [t.chunk(shards, dim=1)[module.tp_rank] if t.dim() == 2 else t for t in tensors]
    if not isinstance(module, ColumnParallelLinear):
        return tensors
    if len(tensors) != len(module.output_partition_sizes):
        return None  # published as fused as vLLM has it
    # Several shards hold the same key-value head where there are fewer of these heads than shards.
    copies = module.num_kv_head_replicas if isinstance(module, QKVParallelLinear) else 1
    groups = [1, copies, copies] if isinstance(module, QKVParallelLinear) else [1] * len(tensors)
    return [t.chunk(shards // group)[module.tp_rank // group] for t, group in zip(tensors, groups, strict=True)]


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows of all parts, one part after another; a view where the file holds the parts in this order."""
    first, *_ = parts
    if all(before.data_ptr() + before.nbytes == after.data_ptr() for before, after in pairwise(parts)):
        return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
    return torch.cat([*parts])


def _parameter(values: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(values, requires_grad=False)


def _relative_gap(values: torch.Tensor, expected: torch.Tensor) -> float:
    largest = expected.float().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return ((values.float() - expected.float()).abs().max() / largest).item()


def _product_gap(layer: LinearBase | ParallelLMHead, weight: torch.Tensor) -> float:
    """Relative difference of the products of the layer and of `weight` [out, in] with a vector; 0 within rounding."""
    whole = layer.input_size if isinstance(layer, LinearBase) else layer.embedding_dim
    inputs = getattr(layer, "input_size_per_partition", whole)  # of a shard that holds some columns
    if weight.shape[1:] != (inputs,):
        return math.inf  # published transposed, as GPT-2 is: the product would read beyond the vector
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(1, weight.shape[1], generator=generator).to(weight)
    product = layer.quant_method.apply(layer, vector)[:, : len(weight)]
    gap = _relative_gap(product, vector @ weight.T)
    return gap if gap > ROUNDING * torch.finfo(weight.dtype).eps else 0.0
