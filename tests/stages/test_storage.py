"""One contract for local directories and for file systems behind a URI."""

import errno
import json
import os
import socket
import sys
import time
import uuid
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from obstore.exceptions import PermissionDeniedError

from pipeline.errors import WorkspaceError
from pipeline.learning.training_state import TrainingStatePart
from pipeline.stages import storage
from tests.support.disks import on_a_small_disk
from tests.support.gcs_server import gcs_server


@pytest.fixture(params=["local", "file", "memory", "s3"])
def root(request, tmp_path):
    """An empty place: a path, a file URI, a remote file system that lives in this process, an object store."""
    if request.param == "s3":
        return request.getfixturevalue("s3").new_place()
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


def test_of_callers_that_create_one_file_one_is_told_so_and_its_text_stays(root):
    uri = storage.join(root, "owner.json")
    texts = [f"caller {n}" for n in range(8)]
    if root.startswith("fsspec"):  # such a file system has no conditional write: the callers come one after another
        told = [storage.create_text(uri, text) for text in texts]
    else:
        with ThreadPoolExecutor(len(texts)) as threads:
            told = [*threads.map(lambda text: storage.create_text(uri, text), texts)]
    [winner] = [text for text, created in zip(texts, told, strict=True) if created]
    assert storage.read_text(uri) == winner
    assert storage.size_bytes(root) == len(winner), "the others leave nothing behind"


def test_of_callers_that_replace_one_text_one_is_told_so(root):
    uri = storage.join(root, "owner.json")
    assert not storage.replace_text(uri, "new", expected="dead")
    storage.write_text(uri, "dead")
    texts = [f"caller {n}" for n in range(8)]
    if root.startswith("fsspec"):
        told = [storage.replace_text(uri, text, expected="dead") for text in texts]
    else:
        with ThreadPoolExecutor(len(texts)) as threads:
            told = [*threads.map(lambda text: storage.replace_text(uri, text, expected="dead"), texts)]
    [winner] = [text for text, replaced in zip(texts, told, strict=True) if replaced]
    assert storage.read_text(uri) == winner


def test_googles_storage_creates_and_replaces_by_generation(monkeypatch):
    # What object_store, below obstore, takes for servers of one's own: an account that needs no token.
    account = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account))
    with gcs_server() as address:
        uri = f"gs://bucket/ws/owner.json?endpoint_override={address}&scheme=http"
        assert storage.read_text(uri) is None
        assert not storage.replace_text(uri, "nobody", expected="dead")
        for replaced in (None, "caller 7"):
            texts = [f"{replaced} caller {n}" for n in range(8)]
            if replaced is not None:
                storage.write_text(uri, replaced)

            def attempt(text, replaced=replaced):
                if replaced is None:
                    return storage.create_text(uri, text)
                return storage.replace_text(uri, text, expected=replaced)

            with ThreadPoolExecutor(len(texts)) as threads:
                told = [*threads.map(attempt, texts)]
            assert [text for text, won in zip(texts, told, strict=True) if won] == [storage.read_text(uri)]
        storage.delete_file(uri)
        assert storage.read_text(uri) is None


def test_pieces_become_one_file(root):
    uri = storage.join(root, "step", "part")
    storage.write_pieces(uri, (memoryview(bytes([n])) for n in range(5)), num_bytes=5)
    with storage.reading(storage.join(root, "step")) as directory, open(f"{directory}/part", "rb") as stream:
        assert stream.read() == bytes(range(5))


def test_a_copy_of_a_copy_is_the_same_wherever_it_lies(root, tmp_path, s3):
    storage.write_text(storage.join(root, "metrics", "rows.jsonl"), "1")
    elsewhere = s3.new_place("copies")
    storage.copy(root, elsewhere)
    storage.copy(elsewhere, str(tmp_path / "back"))
    assert (tmp_path / "back" / "metrics" / "rows.jsonl").read_text() == "1"


def test_paths_are_joined_before_the_query():
    uri = "s3://bucket/runs/?endpoint_override=127.0.0.1:9000&scheme=http"
    below = storage.join(uri, "stages", "sft-01")
    assert below == "s3://bucket/runs/stages/sft-01?endpoint_override=127.0.0.1:9000&scheme=http"
    assert storage.parent(below) == "s3://bucket/runs/stages?endpoint_override=127.0.0.1:9000&scheme=http"
    assert storage.join("/disk/what?", "sft") == "/disk/what?/sft"
    assert storage.join("file:///disk/what?", "sft") == "file:///disk/what?/sft"


def test_a_large_object_travels_by_parts_both_ways(s3, monkeypatch, tmp_path):
    monkeypatch.setattr(storage.object_store, "PART_BYTES", 5 * 2**20)
    place, data = s3.new_place("large"), os.urandom(12 * 2**20)
    (tmp_path / "weights").write_bytes(data)
    before = len(s3.requests)
    storage.copy(str(tmp_path), place)
    pieces = (memoryview(data)[start : start + 2**20] for start in range(0, len(data), 2**20))
    storage.write_pieces(storage.join(place, "streamed"), pieces, num_bytes=len(data))
    parts = [path for method, path in s3.requests[before:] if method == "PUT" and "partNumber" in path]
    assert len(parts) == 6  # three of each
    with storage.reading(place) as directory:
        assert [Path(directory, name).read_bytes() == data for name in ("weights", "streamed")] == [True, True]
    assert storage.object_store.part_bytes(10**12) * 10_000 >= 10**12


def test_keys_with_blanks_and_marks_are_taken_as_they_are_written(s3):
    place = storage.join(s3.new_place("in place/50%"), "wörter #1")
    storage.write_text(storage.join(place, "a.json"), "1")
    assert storage.read_text(storage.join(place, "a.json")) == "1"
    assert storage.list_directories(storage.parent(place)) == ["wörter #1"]


def test_slashes_too_many_are_one(s3):
    bucket = s3.new_bucket()
    storage.write_text(f"s3://{bucket}//runs//a/x.json?{s3.query}", "1")
    assert storage.read_text(f"s3://{bucket}/runs/a/x.json?{s3.query}") == "1"


@pytest.mark.parametrize("uri", ["file://localhost/disk/ws", "file://runs/ws", "file:/disk/ws", "file://~/ws"])
def test_a_file_uri_that_would_be_a_relative_path_is_refused(uri):
    with pytest.raises(WorkspaceError, match=r"names no path of this machine\. Write file:///PATH"):
        storage.check_uri(uri)


def test_a_bucket_that_is_not_there_is_refused_by_name(s3):
    uri = f"s3://nowhere/ws?{s3.query}"
    letter = rf"s3://nowhere/ws.* there is no bucket 'nowhere' at http://{s3.address}. Create it"
    for use in (storage.list_directories, storage.size_bytes, storage.read_text):
        with pytest.raises(WorkspaceError, match=letter):
            use(uri)
    with pytest.raises(WorkspaceError, match=letter):
        storage.require_writable(uri, needs_bytes=0)


def test_a_bucket_that_may_not_be_written_is_refused_by_name(s3, monkeypatch):
    def refuse(*arguments, **named):
        raise PermissionDeniedError("403 Forbidden: AccessDenied")

    place = s3.new_place()
    monkeypatch.setattr(storage.object_store.obstore, "put", refuse)
    with pytest.raises(WorkspaceError, match=r"ws\?endpoint.* refuses this job. Check the credentials.*AccessDenied"):
        storage.require_writable(place, needs_bytes=0)


def test_a_server_that_does_not_answer_is_refused_within_seconds(s3):
    started = time.monotonic()
    with pytest.raises(WorkspaceError, match=r"at http://127\.0\.0\.1:9 no request succeeds: .*Check address"):
        storage.require_writable("s3://bucket/ws?endpoint_override=127.0.0.1:9&scheme=http", needs_bytes=0)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("uri", "letter"),
    [
        ("s3://key:secret@bucket/ws?region=eu-west-1", r"s3://\.\.\.@bucket/ws\?region=eu-west-1 carries credentials"),
        ("s3://bucket/ws?endpoint=host", r"has endpoint in its query.*it may have endpoint_override, scheme, region"),
        ("s3:///ws", r"s3:///ws names no bucket\. Write s3://BUCKET/PATH"),
        ("s3://bucket/ws?access_key=secret", r"s3://bucket/ws has access_key in its query"),
        ("s3://bucket/ws?endpoint_override=&scheme=http", r"has endpoint_override=, which is no address\. Write HOST"),
        (
            "s3://bucket/ws?endpoint_override=http://host:9",
            r"=http://host:9, .* scheme=http beside it",
        ),
        ("s3://bucket/ws?endpoint_override=host&scheme=ftp", r"scheme=ftp in its query\. Write http or https"),
        ("s3://bucket/ws?scheme=http&scheme=https", r"has scheme twice in its query"),
        ("s3://bucket/ws/../other", r"has \. or \.\. in its path"),
    ],
)
def test_uris_that_cannot_be_meant_are_refused(uri, letter):
    for use in (lambda: storage.require_writable(uri, needs_bytes=0), lambda: storage.read_text(uri)):
        with pytest.raises(WorkspaceError, match=letter) as refusal:
            use()
        assert "secret" not in str(refusal.value)


def test_credentials_of_a_profile_are_found(s3, monkeypatch, tmp_path):
    place = s3.new_place()
    (tmp_path / "credentials").write_text("[team]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_PROFILE", "team")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    storage.object_store._store.cache_clear()
    storage.write_text(storage.join(place, "a"), "1")
    assert storage.read_text(storage.join(place, "a")) == "1"
    monkeypatch.setitem(sys.modules, "obstore.auth.boto3", None)
    storage.object_store._store.cache_clear()
    with pytest.raises(WorkspaceError, match=r"in a profile .*boto3.* is not installed.*AWS_ACCESS_KEY_ID"):
        storage.read_text(storage.join(place, "a"))
    storage.object_store._store.cache_clear()


def test_a_node_without_credentials_is_named(s3, monkeypatch):
    place = s3.new_place()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")  # nobody tells a role
    storage.object_store._store.cache_clear()
    letter = rf"host {socket.gethostname()} has no credentials for bucket 'bucket-.* Set them on every node before `ray"
    with pytest.raises(WorkspaceError, match=letter):
        storage.require_writable(place, needs_bytes=0)
    storage.object_store._store.cache_clear()


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
