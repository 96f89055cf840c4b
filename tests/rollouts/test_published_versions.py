"""Files of published versions that are written behind a transfer: what they hold, who waits, and what fails."""

import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import ResourceError
from pipeline.models.tensor_stream import TensorStream
from pipeline.rollouts.published_versions import PublishedVersions, await_file

FILE = "model.safetensors"


def pass_all(versions, state):
    return {name: tensor.clone() for name, tensor in versions.write_behind(iter(state.items()), torch.float32)}


def test_the_file_behind_a_transfer_holds_what_was_sent_although_the_policy_has_moved_on(tmp_path):
    versions = PublishedVersions(str(tmp_path))
    policy = {"w": torch.arange(6.0), "v": torch.ones(2, 2)}
    versions.write(0, TensorStream.of(policy))
    versions.announce(1)
    assert versions.is_due
    assert not (tmp_path / "policy-000001" / FILE).exists()
    assert pass_all(versions, policy).keys() == policy.keys()
    policy["w"].zero_()
    assert not versions.is_due
    await_file(str(tmp_path / "policy-000001"), 30.0)
    assert torch.equal(load_file(tmp_path / "policy-000001" / FILE)["w"], torch.arange(6.0))


def test_a_pass_that_stopped_half_way_leaves_the_file_due(tmp_path):
    versions, policy = PublishedVersions(str(tmp_path)), {"w": torch.ones(1), "v": torch.ones(1)}
    versions.announce(3)
    next(versions.write_behind(iter(policy.items()), torch.float32))
    assert versions.is_due
    pass_all(versions, policy)
    versions.finish()
    assert load_file(tmp_path / "policy-000003" / FILE).keys() == policy.keys()


def test_the_file_of_a_killed_run_is_not_taken_for_the_one_that_follows(tmp_path):
    PublishedVersions(str(tmp_path)).write(4, TensorStream.of({"w": torch.zeros(3)}))
    versions = PublishedVersions(str(tmp_path))
    versions.announce(4)
    started = time.monotonic()
    await_file(str(tmp_path / "policy-000004"), 0.1)
    assert time.monotonic() - started >= 0.1
    pass_all(versions, {"w": torch.ones(3)})
    await_file(str(tmp_path / "policy-000004"), 30.0)
    assert load_file(tmp_path / "policy-000004" / FILE)["w"].tolist() == [1.0, 1.0, 1.0]


def test_two_versions_stay_and_the_next_waits_for_the_one_before(tmp_path, monkeypatch):
    versions, may_write = PublishedVersions(str(tmp_path)), threading.Event()
    write = versions._files.write
    monkeypatch.setattr(versions._files, "write", lambda *a, **named: may_write.wait(30) and write(*a, **named))
    for version in range(4):
        threading.Timer(0.05, may_write.set).start()
        versions.announce(version)  # waits for the thread that writes the version before
        assert version == 0 or (tmp_path / f"policy-{version - 1:06d}" / FILE).exists()
        may_write.clear()
        pass_all(versions, {"w": torch.full((2,), float(version))})
    may_write.set()
    versions.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy-000002", "policy-000003"]


def test_a_rank_that_does_not_write_knows_what_is_due_and_touches_no_file(tmp_path):
    PublishedVersions(str(tmp_path)).write(1, TensorStream.of({"w": torch.zeros(1)}))
    versions = PublishedVersions(str(tmp_path), writes=False)
    versions.announce(1)
    assert versions.is_due
    pass_all(versions, {"w": torch.ones(1)})
    assert not versions.is_due
    versions.finish()
    assert load_file(tmp_path / "policy-000001" / FILE)["w"].tolist() == [0.0]


def test_a_file_that_found_no_room_stops_the_next_version(tmp_path, monkeypatch):
    versions = PublishedVersions(str(tmp_path))

    def full(*arguments, **named):
        raise ResourceError("/dev/shm is full")

    monkeypatch.setattr(versions._files, "write", full)
    versions.announce(0)
    pass_all(versions, {"w": torch.ones(1)})
    with pytest.raises(ResourceError, match="/dev/shm is full"):
        versions.announce(1)
