"""Tensors are written one at a time, into files that transformers and safetensors read."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.models.backbone import load_causal_lm
from pipeline.models.tensor_stream import TensorStream
from tests.support.allocations import peak_tensor_bytes


def counted(count, numbers):
    """Tensors that are made when they are asked for, in a stream."""
    outline = {f"t{n:02d}": torch.empty(numbers, device="meta") for n in range(count)}
    return TensorStream(outline=outline, tensors=((name, torch.full((numbers,), int(name[1:]))) for name in outline))


def test_memory_holds_one_tensor_of_those_that_are_written(tmp_path):
    stream = counted(20, 100_000).to(torch.float32)
    # The number as an integer of eight bytes and as a float of four.
    assert peak_tensor_bytes(lambda: stream.write(tmp_path)) < 2 * 12 * 100_000
    written = load_file(tmp_path / "model.safetensors")
    assert {name: tensor.unique().tolist() for name, tensor in written.items()} == {
        f"t{n:02d}": [float(n)] for n in range(20)
    }


def test_a_large_model_is_cut_into_files_with_an_index_that_transformers_reads(tiny_policy, tmp_path):
    model, tokenizer = load_causal_lm(tiny_policy, dtype="float32")
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    TensorStream.of(model.state_dict()).write(tmp_path, file_bytes=100_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    again = load_causal_lm(str(tmp_path), dtype="float32")[0].state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_a_stream_is_described_before_its_tensors_come_and_changes_with_them():
    first = {"a.weight": torch.ones(2, 3), "b.weight": torch.ones(4, dtype=torch.bfloat16)}
    stream = TensorStream.of(first).followed_by({"a.weight": torch.zeros(9), "a.bias": torch.ones(2)})
    stream, passed = stream.merged(nn.Linear(1, 1)).noting("a.bias")
    part = stream.below("a.").to(torch.bfloat16)
    assert {name: (tuple(t.shape), t.dtype) for name, t in part.outline.items()} == {
        "weight": ((2, 3), torch.bfloat16),
        "bias": ((2,), torch.bfloat16),
    }
    assert not passed
    tensors = dict(part.tensors)
    assert list(tensors) == ["weight", "bias"]
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    assert passed["a.bias"].tolist() == [1.0, 1.0]


def test_tensors_that_come_in_another_order_than_they_said_are_not_written_under_wrong_names(tmp_path):
    stream = counted(2, 3)
    swapped = TensorStream(outline=stream.outline, tensors=iter([*stream.tensors][::-1]))
    with pytest.raises(AssertionError, match="t01 came where t00 was due"):
        swapped.write(tmp_path)
