"""Loading a model of which no rank ever holds more than its part and one parameter.

The model is made without numbers. Then one parameter after the other is read from its safetensors file, split among the
ranks, and forgotten but for the rank's part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.initialization import no_init_weights
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from pipeline.models.checkpoint_files import safetensors_entries
from pipeline.models.safetensors_pieces import SAFETENSORS_DTYPES

EXPERT = re.compile(r"\.experts\.(\d+)\.")
"""In the name of a tensor of the files: which expert of a mixture it belongs to."""
PIECE_NUMBERS = 2**22
"""Of a tensor on its way from the file: the rank that reads holds so many in the dtype of the file."""


class Shards(Protocol):
    """The ranks among which the parameters of a model are split while it is loaded. All of them load the same model."""

    device: torch.device
    """Where this rank computes."""
    reads: bool
    """Whether this rank reads the files. The others get the numbers from it."""

    def split(self, parameter: nn.Parameter) -> None:
        """Splits a whole parameter among the ranks, in place, with the numbers of the rank that reads. Collective.

        Afterwards the parameter has memory of its own, and the memory of the whole is the caller's again.
        """

    def gathering(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside the block the model computes although it is split: each module gathers its own parameters first, and
        forgets them afterwards. Every rank must compute the same."""


class WeightFiles:
    """The tensors of a checkpoint's safetensors files, read in pieces. A context manager: the files stay open inside.

    The library maps a file into memory, where its pages would stay. Here they pass.
    """

    def __init__(self, files: Sequence[str]) -> None:
        """Reads the headers.

        Raises:
            CheckpointError: as `safetensors_entries`.
        """
        self._opened = ExitStack()
        self._entries: dict[str, tuple[Any, int, Any]] = {}
        for file in files:
            entries, begin = safetensors_entries(Path(file))
            opened = self._opened.enter_context(open(file, "rb", buffering=0))  # noqa: SIM115  the stack closes it
            self._entries |= {name: (opened, begin, entry) for name, entry in entries.items()}

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name][2]["shape"])

    def read(self, name: str, target: torch.Tensor) -> None:
        """Fills a contiguous tensor of as many numbers, of any dtype and on any device.

        Raises:
            ValueError: the file has numbers of a kind that no model here computes with.
        """
        file, begin, entry = self._entries[name]
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"{name} is of the kind {entry['dtype']}, not {', '.join(SAFETENSORS_DTYPES)}")
        file.seek(begin + entry["data_offsets"][0])
        for piece in target.view(-1).split(PIECE_NUMBERS):
            numbers = torch.empty(piece.numel(), dtype=dtype)
            unread = numbers.view(torch.uint8).numpy().data
            while unread:
                count = file.readinto(unread)
                if not count:
                    raise OSError(f"{file.name} ends within {name}")
                unread = unread[count:]
            piece.copy_(numbers)

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._opened.close()


def files_of(checkpoint: str) -> list[str]:
    """The safetensors files of a directory or a hub name, which are downloaded where they are not here yet.

    Raises:
        OSError: there are none.
    """
    whole = cached_file(checkpoint, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if whole is not None:
        return [whole]
    index = cached_file(checkpoint, SAFE_WEIGHTS_INDEX_NAME)
    return list(get_checkpoint_shard_files(checkpoint, index)[0])


def without_numbers(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A model whose parameters have a shape and a dtype but no numbers, in eval mode; its buffers are whole."""
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = make()
    model.tie_weights()
    return model.eval()


Sources = Mapping[str, Sequence[str]]
"""Tensor of a model -> tensors of the files. Their numbers, one after the other, are those of the model's tensor."""


def sources_of(model: PreTrainedModel, names: Sequence[str]) -> Sources | None:
    """Where the tensors of a model lie in the files, by transformers' own rules for prefixes, outdated names, experts.

    The experts of a mixture are files' tensors of their own, and one of the model: [expert, output, input], or with the
    gate's outputs before the others', [expert, 2 outputs, input].

    None where a tensor of the model is computed in another way. How, only transformers knows.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    wanted, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, list[tuple[int, int, str]]] = {}
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if renamed not in wanted and name in wanted:
            renamed, pattern = rename_source_key(name, [], [], prefix, wanted)
        if renamed not in wanted:
            continue
        expert = part = 0
        if pattern is not None:
            converter = next(rule for rule in converters if pattern in rule.source_patterns)
            number = EXPERT.search(name)
            if number is None or not _stacks_experts(converter):
                return None
            expert, part = int(number[1]), converter.source_patterns.index(pattern)
        found.setdefault(renamed, []).append((expert, part, name))
    return {tensor: [name for _, _, name in sorted(sources)] for tensor, sources in found.items()}


def _stacks_experts(converter: WeightConverter) -> bool:
    """Whether the rule puts the matrices of experts one after the other, and of each the gate before the input."""
    first, *others = converter.operations
    return (
        isinstance(first, MergeModulelist)
        and first.dim == 0
        and all(isinstance(other, Concatenate) and other.dim == 1 for other in others)
        and len(converter.target_patterns) == 1
    )


def fill_in_shards(module: nn.Module, files: WeightFiles, sources: Sources, shards: Shards) -> list[str]:
    """Reads and splits every parameter of a module without numbers, one at a time; reads its buffers whole. Collective.

    Returns:
        Names of the tensors that the files lack. Where there are any, nothing was read.

    Raises:
        ValueError: tensors of the files have other shapes.
    """
    parameters = list(_parameters_with_owners(module))
    state = module.state_dict()
    buffers = {name: buffer for name, buffer in state.items() if not buffer.is_meta}
    missing = [names[0] for _, _, names in parameters if not any(name in sources for name in names)]
    missing += [name for name in buffers if name not in sources]
    if missing:
        return missing
    for name, parts in sources.items():
        _check_shapes(files, parts, tuple(state[name].shape))
    for name, buffer in buffers.items():
        _read(files, sources[name], buffer)
    # All parameters pass through the same memory: a rank's parts would otherwise lie between the holes of whole ones.
    room = torch.empty(max(empty.nbytes for empty, _, _ in parameters), dtype=torch.uint8, device=shards.device)
    for empty, owners, names in parameters:
        numbers = room[: empty.nbytes].view(empty.dtype).view(empty.shape)
        if shards.reads:
            _read(files, next(sources[name] for name in names if name in sources), numbers)
        parameter = nn.Parameter(numbers, requires_grad=empty.requires_grad)
        for owner, attribute in owners:
            setattr(owner, attribute, parameter)
        shards.split(parameter)
    move_buffers(module, shards.device)
    return []


def _check_shapes(files: WeightFiles, parts: Sequence[str], shape: tuple[int, ...]) -> None:
    """
    Raises:
        ValueError: the parts do not make a tensor of that shape.
    """
    expected = shape
    if len(parts) > 1:
        experts, outputs, inputs = shape
        each = max(1, len(parts) // experts)
        expected = (outputs // each, inputs)
        if len(parts) != each * experts:
            raise ValueError(f"{parts[0]} and its like are {len(parts)}, the architecture has {experts} experts")
    for part in parts:
        if files.shape(part) != expected:
            raise ValueError(f"{part} has the shape {files.shape(part)}, the architecture asks for {expected}")


def _read(files: WeightFiles, parts: Sequence[str], target: torch.Tensor) -> None:
    """Fills a contiguous tensor with the parts, one after the other."""
    for part, piece in zip(parts, target.view(-1).chunk(len(parts)), strict=True):
        files.read(part, piece)


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """To a device, and no parameters: the parts of split ones stay where they are."""
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            owner._buffers[name] = buffer.to(device)


Owner = tuple[nn.Module, str]


def _parameters_with_owners(module: nn.Module) -> Iterator[tuple[nn.Parameter, list[Owner], list[str]]]:
    """Each parameter once, with all modules that have it, and all its names: tied embeddings have two of each."""
    found: dict[int, tuple[nn.Parameter, list[Owner], list[str]]] = {}
    for prefix, owner in module.named_modules():
        for attribute, parameter in owner.named_parameters(recurse=False):
            _, owners, names = found.setdefault(id(parameter), (parameter, [], []))
            owners.append((owner, attribute))
            names.append(f"{prefix}.{attribute}" if prefix else attribute)
    yield from found.values()
