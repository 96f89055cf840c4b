"""Weights published on one node are read on another; two raylets of one machine stand for the nodes."""

import os
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import actors.weight_relay
from actors.weight_relay import _make_place, readable_here
from cluster.session import remove_from_nodes
from pipeline.errors import DeadlineExceeded
from pipeline.records import PolicyWeights
from tests.support.nodes import Node

pytestmark = pytest.mark.components
SIZE = 70 * 2**20 + 3  # two whole buckets and a part


@pytest.fixture(scope="module")
def two_nodes(local_ray):
    other = Node(num_cpus=1)
    yield ray.get_runtime_context().get_node_id(), other.id
    other.lose_power()


def read_on(node, weights, times=1):
    @ray.remote(num_cpus=0)
    def read():
        here, is_fetched = readable_here(weights)
        file = Path(here.location) / "model.safetensors"
        return here.location, here.node, file.read_bytes(), is_fetched

    placed = read.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
    return ray.get([placed.remote() for _ in range(times)], timeout=120)


def publish_on(node, directory, version, data):
    location = directory / "weights" / f"policy-{version:06d}"
    location.mkdir(parents=True, exist_ok=True)
    (location / "model.safetensors").write_bytes(data)
    return PolicyWeights(version=version, location=str(location), probes=(), node=node)


def test_each_node_reads_the_weights_and_fetches_them_once(two_nodes, tmp_path):
    publisher, other = two_nodes
    publish = partial(publish_on, publisher, tmp_path)
    first = publish(0, os.urandom(SIZE))
    whole = Path(first.location, "model.safetensors").read_bytes()
    [(location, node, data, is_fetched)] = read_on(publisher, first)
    assert (location, node, is_fetched) == (first.location, publisher, False)
    assert data == whole

    copies = read_on(other, first, times=3)
    assert {location for location, *_ in copies} == {copies[0][0]} != {first.location}
    assert all(node == other and data == whole for _, node, data, _ in copies)
    assert [is_fetched for *_, is_fetched in copies].count(True) == 1

    # A killed run's successor publishes a version of the same number: the copy of the dead one is not mistaken for it.
    [(_, _, data, _)] = read_on(other, publish(0, b"published again"))
    assert data == b"published again"
    # One copy is read while the next arrives, over the pages of the one before.
    files = set()
    for version in range(1, 6):
        [(location, _, data, _)] = read_on(other, publish(version, b"version" * version))
        assert data == b"version" * version
        files.add(Path(location, "model.safetensors").stat().st_ino)
        assert len([*Path(location).parent.iterdir()]) == 2
    assert len(files) == 2


@pytest.mark.parametrize("hanging", ["_read", "_stat"])
def test_a_node_that_does_not_hand_out_its_weights_is_named_with_how_long_it_was_asked(
    hanging, two_nodes, tmp_path, monkeypatch
):
    here, other = two_nodes
    readable_here(publish_on(other, tmp_path, 6, b"while all is well"))
    weights = publish_on(other, tmp_path, 7, b"weights")
    monkeypatch.setattr(actors.weight_relay, "FETCH_TIMEOUT_S", 3.0)
    monkeypatch.setattr(actors.weight_relay, hanging, ray.remote(num_cpus=0)(lambda *_: time.sleep(60)))
    started = time.monotonic()
    with pytest.raises(
        DeadlineExceeded,
        match=rf"fetching policy version 7 from node {other[:12]} to node {here[:12]} did not end: "
        r"nothing arrived for 3 s",
    ):
        readable_here(weights)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("reader", [0, 1])
def test_a_file_that_follows_is_waited_for_on_every_node(reader, two_nodes, tmp_path):
    publisher = two_nodes[0]
    location = tmp_path / "weights" / "policy-000008"
    following = PolicyWeights(version=8, location=str(location), probes=(), node=publisher, file_follows=True)
    writing = threading.Timer(2.0, publish_on, (publisher, tmp_path, 8, b"behind the transfer"))
    writing.start()
    [(_, _, data, _)] = read_on(two_nodes[reader], following)
    assert data == b"behind the transfer"
    writing.join()


def test_what_a_run_published_is_removed_with_the_help_of_every_node(two_nodes, tmp_path):
    publish_on(two_nodes[1], tmp_path, 9, b"outdated")
    assert (tmp_path / "weights").exists()
    remove_from_nodes(str(tmp_path / "weights"))
    assert not (tmp_path / "weights").exists()


def test_pages_lent_to_a_new_copy_are_not_taken_for_it(tmp_path):
    """A worker may be killed before the new weights have come; its neighbour looks for the file."""
    for version in (1, 2):
        (tmp_path / f"policy-{version}").mkdir()
        (tmp_path / f"policy-{version}" / "model.safetensors").write_text(f"version {version}")
    _make_place(tmp_path / "policy-3")
    assert {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("model*")} == {
        "policy-2/model.safetensors": "version 2",
        "policy-3/model.safetensors.partial": "version 1",
    }
