"""A safetensors file piece by piece, from the memory in which the tensors lie: the library itself joins them first."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping

import torch

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
}
"""Names that safetensors gives them."""
LENGTH = struct.Struct("<Q")
PIECE_BYTES = 8 * 2**20


def safetensors_header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The length of a JSON text, and the text, which says where each tensor's bytes lie after it.

    Source: https://github.com/huggingface/safetensors#format; the text is padded so that tensors start aligned.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": names[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % LENGTH.size)
    return LENGTH.pack(len(text)) + text


def safetensors_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """The size of the file."""
    return len(safetensors_header(tensors, metadata)) + sum(tensor.nbytes for tensor in tensors.values())


def safetensors_pieces(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[memoryview]:
    """The bytes of the file in order; the tensors are in host memory and contiguous."""
    yield memoryview(safetensors_header(tensors, metadata))
    for tensor in tensors.values():
        yield from tensor_pieces(tensor)


def tensor_pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of one tensor."""
    data = tensor.view(-1).view(torch.uint8).numpy().data
    for begin in range(0, len(data), PIECE_BYTES):
        yield data[begin : begin + PIECE_BYTES]
