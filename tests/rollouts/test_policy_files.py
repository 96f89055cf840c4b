"""Published policies: any reader of safetensors takes them, and versions take each other's place in memory."""

import os

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import CheckpointError, ResourceError
from pipeline.models.tensor_stream import TensorStream
from pipeline.rollouts.policy_files import PolicyFiles

FILE = "model.safetensors"


def test_publishing_into_too_small_a_shared_memory_says_how_to_enlarge_it(tmp_path):
    # A view of one number: 4 EiB by its shape, 4 bytes in memory.
    huge = torch.zeros(1).expand(2**60)
    with pytest.raises(ResourceError, match=r"needs 4,398,046,511,104 MiB, .* MiB free. Enlarge .*--shm-size"):
        PolicyFiles().write(TensorStream.of({"lm_head.weight": huge}), tmp_path / "policy-000000")


def test_published_weights_are_read_by_safetensors_as_they_were(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {
        "a": torch.randn(3, 5, generator=generator),
        "transposed": torch.randn(4, 2, generator=generator).T,
        "bfloat16": torch.randn(7, generator=generator).bfloat16(),
    }
    state["tied"] = state["a"]
    longer = {"a": torch.zeros(100, 100)}
    PolicyFiles().write(TensorStream.of(longer), tmp_path / "policy-000000")
    PolicyFiles().write(TensorStream.of(state), tmp_path / "policy-000002", replaced=tmp_path / "policy-000000")
    assert [path.name for path in tmp_path.iterdir()] == ["policy-000002"]
    published = load_file(tmp_path / "policy-000002" / "model.safetensors")
    assert published.keys() == state.keys()
    assert all(
        torch.equal(published[name], state[name]) and published[name].dtype == state[name].dtype for name in state
    )


def test_versions_lie_in_two_files_by_turns_and_readers_keep_their_mappings(tmp_path):
    learner, engine = PolicyFiles(), PolicyFiles()
    files, addresses = [], []
    for version in range(6):
        location = tmp_path / f"policy-{version}"
        learner.write(
            TensorStream.of({"w": torch.full((1000,), float(version))}),
            location,
            replaced=tmp_path / f"policy-{version - 2}",
        )
        read = engine.read(location)["w"]
        assert read.unique().tolist() == [version]
        files.append(os.stat(location / FILE).st_ino)
        addresses.append(read.data_ptr())
    assert files == files[:2] * 3
    assert addresses == addresses[:2] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy-4", "policy-5"]


def test_a_version_of_another_size_is_read_as_it_is(tmp_path):
    files = PolicyFiles()
    for count in (3000, 10, 5000):
        files.write(TensorStream.of({"w": torch.arange(count, dtype=torch.float32)}), tmp_path)
        assert torch.equal(files.read(tmp_path)["w"], torch.arange(count, dtype=torch.float32))
        assert torch.equal(load_file(tmp_path / FILE)["w"], files.read(tmp_path)["w"])


def test_every_byte_of_a_file_is_backed_before_it_is_written(tmp_path, monkeypatch):
    """A page that cannot be had ends the process that writes to it: no error says so."""
    state = {"w": torch.ones(2**20)}
    PolicyFiles().write(TensorStream.of(state), tmp_path / "first")
    size = os.stat(tmp_path / "first" / FILE).st_size
    # What a writer leaves that was killed between sizing the file and filling it.
    partial = tmp_path / "second" / f"{FILE}.partial"
    partial.parent.mkdir()
    with open(partial, "wb") as sparse:
        sparse.truncate(size)
    assert os.stat(partial).st_blocks == 0

    backed, mapped = [], PolicyFiles._map
    monkeypatch.setattr(
        PolicyFiles, "_map", lambda files, path: backed.append(os.stat(path).st_blocks * 512) or mapped(files, path)
    )
    PolicyFiles().write(TensorStream.of(state), tmp_path / "second")
    assert backed[0] >= size


def test_a_policy_that_is_not_there_is_named_with_the_node_that_looked(tmp_path):
    path = tmp_path / FILE
    with pytest.raises(CheckpointError, match=rf"no published weights at '{path}' on node {os.uname().nodename}"):
        PolicyFiles().read(tmp_path)
