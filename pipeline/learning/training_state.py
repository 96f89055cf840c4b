"""A training state on disk, independent of the engine that wrote it: any engine reads it, on any number of ranks.

Every rank writes its own part, without the others. A reader takes the elements of its own part from all files. The
files are described in docs/checkpoints.md.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from pipeline.errors import CheckpointError
from pipeline.models.safetensors_pieces import safetensors_bytes, safetensors_pieces
from pipeline.stages import storage

FORMAT = "vrm-training-state-1"
PART = re.compile(r"part-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A run of one flattened parameter that a rank is responsible for, as views of the engine's own memory."""

    name: str
    start: int
    """Index of its first element in the flattened parameter."""
    step: torch.Tensor
    """Scalar: optimiser steps taken."""
    tensors: Mapping[str, torch.Tensor]
    """`weight`, `exp_avg` and `exp_avg_sq`, each [n] float32."""

    @classmethod
    def of(cls, name: str, start: int, weight: torch.Tensor, adam: Mapping[str, Any], *, at: int = 0) -> Fragment:
        """A fragment whose moments begin at index `at` of AdamW's flattened state."""
        moments = {kind: adam[kind].view(-1).narrow(0, at, weight.numel()) for kind in ("exp_avg", "exp_avg_sq")}
        return cls(name=name, start=start, step=adam["step"], tensors={"weight": weight, **moments})


@dataclass(frozen=True, kw_only=True)
class TrainingStatePart:
    """A copy in host memory of one rank's part; training may continue while it is written. A `Snapshot`."""

    part: int
    num_parts: int
    shapes: Mapping[str, tuple[int, ...]]
    """The whole shape of every trained parameter, by name."""
    tensors: Mapping[str, torch.Tensor]
    """The fragments' tensors, by `<kind>/<start>/<name>`."""

    @classmethod
    def take(
        cls, fragments: Iterable[Fragment], shapes: Mapping[str, tuple[int, ...]], *, part: int, num_parts: int
    ) -> TrainingStatePart:
        """Copies the fragments of a rank, one of `num_parts`."""
        tensors = {
            f"{kind}/{fragment.start}/{fragment.name}": view.detach().to("cpu", copy=True)
            for fragment in fragments
            for kind, view in {**fragment.tensors, "step": fragment.step}.items()
        }
        return cls(part=part, num_parts=num_parts, shapes=shapes, tensors=tensors)

    def write(self, uri: str) -> None:
        """Writes one safetensors file below `uri`, next to those of the other ranks."""
        name = f"part-{self.part:05d}-of-{self.num_parts:05d}.safetensors"
        header = {"format": FORMAT, "shapes": json.dumps(self.shapes)}
        storage.write_pieces(
            storage.join(uri, name),
            safetensors_pieces(self.tensors, header),
            num_bytes=safetensors_bytes(self.tensors, header),
        )


class SavedState:
    """Reads the parts that all ranks wrote. A context manager: the files stay open inside."""

    def __init__(self, directory: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Opens the parts.

        Args:
            shapes: shape of every trained parameter of the model that is to be restored.

        Raises:
            CheckpointError: a file is missing or cannot be read, or they hold another model.
        """
        self._directory = directory
        self._files = ExitStack()
        self._fragments: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        try:
            for path in self._part_paths():
                self._index(self._files.enter_context(safe_open(path, framework="pt")), shapes)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{directory} cannot be read: {error}. {_CURE}") from error

    def _part_paths(self) -> list[str]:
        names = sorted(os.listdir(self._directory)) if os.path.isdir(self._directory) else []
        parts = [match for match in map(PART.fullmatch, names) if match]
        if not parts or [int(match[1]) for match in parts] != list(range(int(parts[-1][2]))):
            found = ", ".join(match[0] for match in parts) or "nothing of it"
            raise CheckpointError(f"{self._directory} is no whole training state: it holds {found}. {_CURE}")
        return [os.path.join(self._directory, match[0]) for match in parts]

    def _index(self, file: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        header = file.metadata() or {}
        if header.get("format") != FORMAT:
            raise CheckpointError(f"{self._directory} is not in the form {FORMAT}. {_CURE}")
        saved = {name: tuple(shape) for name, shape in json.loads(header["shapes"]).items()}
        if saved != dict(shapes):
            differing = sorted(name for name in saved.keys() | shapes.keys() if saved.get(name) != shapes.get(name))
            first = differing[0]
            raise CheckpointError(
                f"{self._directory} does not restore this model: {len(differing)} parameters differ, the first is "
                f"{first} (saved {saved.get(first, 'not at all')}, now trained {shapes.get(first, 'not at all')}). "
                f"Was the recipe's model changed? {_CURE}"
            )
        for key in list(file.keys()):
            kind, start, name = key.split("/", 2)
            stop = int(start) + (1 if kind == "step" else file.get_slice(key).get_shape()[0])
            self._fragments.setdefault((kind, name), []).append((int(start), stop, file, key))

    def restore(self, fragments: Iterable[Fragment]) -> None:
        """Fills the fragments of an engine in place."""
        with torch.no_grad():
            for fragment in fragments:
                for kind, view in fragment.tensors.items():
                    view.copy_(self.read(kind, fragment.name, fragment.start, view.numel()))
                [*_, (_, _, file, key)] = self._of("step", fragment.name)
                fragment.step.copy_(file.get_tensor(key))

    def read(self, kind: str, name: str, start: int, length: int) -> torch.Tensor:
        """Elements [start, start + length) of a flattened parameter or of its optimiser state, on the CPU."""
        whole, position = torch.empty(length), start
        for first, stop, file, key in self._of(kind, name):
            if first <= position < stop:
                end = min(stop, start + length)
                whole[position - start : end - start] = file.get_slice(key)[position - first : end - first]
                position = end
        if position != start + length:
            raise CheckpointError(f"{self._directory} lacks elements from {position} on of {kind} of {name}. {_CURE}")
        return whole

    def _of(self, kind: str, name: str) -> list[tuple[int, int, Any, str]]:
        try:
            return sorted(self._fragments[kind, name], key=lambda fragment: fragment[0])
        except KeyError as error:
            raise CheckpointError(f"{self._directory} holds no {kind} of {name}. {_CURE}") from error

    def __enter__(self) -> SavedState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()


_CURE = "Delete this checkpoint to resume from the one before it, or use another workspace."


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters by name, each once. Frozen ones are not saved: the learner is built with them."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def adam_state(optimiser: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, Any]:
    """Fused AdamW's state of a parameter; before the first step, the state with which the optimiser starts."""
    state = optimiser.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state
