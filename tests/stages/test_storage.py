"""One contract for local directories and for file systems behind a URI."""

import errno
import os
import uuid
from collections import namedtuple
from contextlib import suppress

import pytest
import torch

from pipeline.errors import WorkspaceError
from pipeline.learning.training_state import TrainingStatePart
from pipeline.stages import storage
from tests.support.disks import on_a_small_disk


@pytest.fixture(params=["local", "file", "memory"])
def root(request, tmp_path):
    """An empty place: a path, a file URI, and a remote file system that lives in this process."""
    return {
        "local": str(tmp_path / "ws"),
        "file": f"file://{tmp_path}/ws",
        "memory": f"fsspec+memory://{uuid.uuid4().hex}/ws",
    }[request.param]


def test_what_was_written_is_read(root):
    with storage.writing(storage.join(root, "result")) as directory:
        os.makedirs(os.path.join(directory, "rank-0"))
        with open(os.path.join(directory, "rank-0", "weights.bin"), "wb") as stream:
            stream.write(b"12345")
    with (
        storage.reading(storage.join(root, "result")) as directory,
        open(os.path.join(directory, "rank-0", "weights.bin"), "rb") as stream,
    ):
        assert stream.read() == b"12345"
    assert storage.size_bytes(root) == 5
    assert storage.list_directories(root) == ["result"]


def test_ranks_write_side_by_side(root):
    for rank in (0, 1):
        with storage.writing(storage.join(root, "step")) as directory, open(f"{directory}/rank-{rank}", "w") as stream:
            stream.write(str(rank))
    with storage.reading(storage.join(root, "step")) as directory:
        assert sorted(os.listdir(directory)) == ["rank-0", "rank-1"]


def test_text_is_replaced_as_a_whole(root):
    uri = storage.join(root, "deep", "manifest.json")
    assert storage.read_text(uri) is None
    storage.write_text(uri, "a long old text")
    storage.write_text(uri, "new")
    assert storage.read_text(uri) == "new"
    assert storage.size_bytes(root) == 3, "no partial file stays behind"


def test_deleting_what_is_missing_is_no_error(root):
    storage.delete_file(storage.join(root, "nothing.json"))
    storage.delete_directory(storage.join(root, "nothing"))
    assert storage.list_directories(storage.join(root, "nothing")) == []
    storage.write_text(storage.join(root, "a", "b.json"), "1")
    storage.delete_directory(storage.join(root, "a"))
    assert storage.read_text(storage.join(root, "a", "b.json")) is None


def test_bytes_that_are_no_text_can_be_looked_at(tmp_path):
    (tmp_path / "manifest.json").write_bytes(b"\xff\x00{")
    assert storage.read_text(str(tmp_path / "manifest.json")) == "\ufffd\x00{"


def test_a_full_disk_becomes_a_letter(root):
    letter = r"no space is left while writing .*the same command then resumes"
    with pytest.raises(WorkspaceError, match=letter), storage.writing(storage.join(root, "result")):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_when_a_commit_is_written_or_synced_is_the_same_letter(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    storage.write_text(str(tmp_path / "result" / "weights"), "1")
    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(WorkspaceError, match=r"no space is left while writing .*manifest\.json"):
        storage.write_text(str(tmp_path / "manifest.json"), "{}")
    with pytest.raises(WorkspaceError, match=r"no space is left while writing .*result"):
        storage.make_durable(str(tmp_path / "result"))


def test_a_checkpoint_that_fills_a_real_disk_is_the_same_letter_and_the_commit_before_stays(tmp_path):
    weights = {"weight/0/linear": torch.ones(100_000)}  # 400 kB
    snapshot = TrainingStatePart(part=0, num_parts=1, shapes={"linear": (100_000,)}, tensors=weights)
    disk = tmp_path / "disk"
    disk.mkdir()

    def save_twice():
        commit = str(disk / "commit.json")
        storage.write_text(commit, "step 1")
        with pytest.raises(WorkspaceError, match=r"no space is left while writing .*step-000001"):
            snapshot.write(str(disk / "step-000001"))
        (disk / "filler").touch()
        with open(disk / "filler", "r+b", buffering=0) as filler, suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        with pytest.raises(WorkspaceError, match=r"no space is left while writing .*commit\.json"):
            storage.write_text(commit, "step 2")
        return storage.read_text(commit)

    try:
        assert on_a_small_disk(disk, 2**17, save_twice) == "step 1"
    except PermissionError:
        pytest.skip("this process may not mount a disk of its own to fill")
    assert list(disk.iterdir()) == []  # nothing went to the large disk instead


def test_other_failures_travel_unchanged(root):
    with pytest.raises(FileNotFoundError), storage.writing(storage.join(root, "result")):
        raise FileNotFoundError("weights.bin")


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WorkspaceError, match=r"file/ws cannot be written: .*Choose another --workspace"):
        storage.require_writable(str(tmp_path / "file" / "ws"), needs_bytes=0)


def test_too_little_space_is_refused_with_both_numbers(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage(10 * 2**30, 8 * 2**30, 2 * 2**30))
    storage.require_writable(str(tmp_path), needs_bytes=2 * 2**30)
    with pytest.raises(WorkspaceError, match=r"has 2\.0 GiB free, the run needs about 3\.5 GiB"):
        storage.require_writable(str(tmp_path), needs_bytes=7 * 2**29)


def test_an_unknown_scheme_is_refused():
    with pytest.raises(WorkspaceError, match=r"nosuch://bucket/ws cannot be opened.*Give a local path or a URI"):
        storage.read_text("nosuch://bucket/ws")
