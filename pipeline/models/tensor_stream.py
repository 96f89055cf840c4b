"""Tensors that come one at a time: a model of which no process needs to hold the whole to write it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pipeline.models.checkpoint_files import INDEX_FILE, WEIGHTS_FILE
from pipeline.models.lora import merged_tensors
from pipeline.models.safetensors_pieces import safetensors_header, tensor_pieces

FILE_BYTES = 50 * 10**9
"""Of a checkpoint's file at most, as transformers cuts them."""

Tensors = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class TensorStream:
    """Tensors with their names. All can be described before the first one is there; each is there once."""

    outline: Mapping[str, torch.Tensor]
    """The same tensors in the same order without numbers, on the device "meta"."""
    tensors: Tensors

    @classmethod
    def of(cls, state: Mapping[str, torch.Tensor]) -> TensorStream:
        """Tensors that are all there."""
        return cls(outline={name: tensor.to("meta") for name, tensor in state.items()}, tensors=iter(state.items()))

    def merged(self, model: nn.Module) -> TensorStream:
        """The plain model that computes what the adapted one does (`merged_tensors`)."""
        return self._through(lambda tensors: merged_tensors(tensors, model))

    def below(self, prefix: str) -> TensorStream:
        """Those whose names begin with the prefix, without it."""
        return self._through(
            lambda tensors: ((name.removeprefix(prefix), t) for name, t in tensors if name.startswith(prefix))
        )

    def to(self, dtype: torch.dtype) -> TensorStream:
        return self._through(lambda tensors: ((name, tensor.to(dtype)) for name, tensor in tensors))

    def converted(self, convert: Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]]) -> TensorStream:
        """With none, one or several tensors in the place of each."""
        return self._through(
            lambda tensors: (pair for name, tensor in tensors for pair in convert(name, tensor).items())
        )

    def followed_by(self, state: Mapping[str, torch.Tensor]) -> TensorStream:
        """With those tensors at the end that are not in it yet."""
        more = TensorStream.of({name: tensor for name, tensor in state.items() if name not in self.outline})

        def both() -> Tensors:
            yield from self.tensors
            yield from more.tensors

        return TensorStream(outline={**self.outline, **more.outline}, tensors=both())

    def noting(self, name: str) -> tuple[TensorStream, Mapping[str, torch.Tensor]]:
        """The same stream, and where one of its tensors is found once it has passed, if there is such a one."""
        passed: dict[str, torch.Tensor] = {}

        def through() -> Tensors:
            for found, tensor in self.tensors:
                if found == name:
                    passed[name] = tensor.detach().clone()
                yield found, tensor

        return TensorStream(outline=self.outline, tensors=through()), passed

    def read_to_the_end(self) -> None:
        """What a rank does that writes nothing: all ranks gather each tensor."""
        for _ in self.tensors:
            pass

    def write(
        self, directory: str | Path, names: Iterable[str] | None = None, *, file_bytes: float = FILE_BYTES
    ) -> None:
        """Writes `model.safetensors`, or several files and their index. Memory holds one tensor.

        Args:
            names: which tensors; None writes all.
            file_bytes: of a file at most, unless a single tensor is larger.
        """
        kept = self.outline if names is None else {name: self.outline[name] for name in names}
        remaining = ((name, tensor) for name, tensor in self.tensors if name in kept)
        files = _files(kept, file_bytes)
        for file, outline in files.items():
            with open(Path(directory) / file, "wb") as opened:
                opened.write(safetensors_header(outline, {"format": "pt"}))  # transformers asks for the format
                for name, (found, tensor) in zip(outline, remaining, strict=False):
                    assert found == name, f"{found} came where {name} was due"
                    for piece in tensor_pieces(tensor.detach().cpu().contiguous()):
                        opened.write(piece)
        for _ in remaining:
            raise AssertionError("more tensors came than the outline has")
        if len(files) > 1:
            total = {
                "total_parameters": sum(tensor.numel() for tensor in kept.values()),
                "total_size": sum(tensor.nbytes for tensor in kept.values()),
            }
            weight_map = {name: file for file, outline in files.items() for name in outline}
            index = {"metadata": total, "weight_map": weight_map}
            (Path(directory) / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _through(self, change: Callable[[Tensors], Tensors]) -> TensorStream:
        return TensorStream(outline=dict(change(iter(self.outline.items()))), tensors=change(self.tensors))


def _files(outline: Mapping[str, torch.Tensor], file_bytes: float) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each file, in order."""
    parts: list[dict[str, torch.Tensor]] = [{}]
    room = file_bytes
    for name, tensor in outline.items():
        if parts[-1] and tensor.nbytes > room:
            parts.append({})
            room = file_bytes
        parts[-1][name] = tensor
        room -= tensor.nbytes
    if len(parts) == 1:
        return {WEIGHTS_FILE: parts[0]}
    stem = WEIGHTS_FILE.removesuffix(".safetensors")
    return {f"{stem}-{n:05d}-of-{len(parts):05d}.safetensors": part for n, part in enumerate(parts, start=1)}
