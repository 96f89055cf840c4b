"""Weights published on one node are read on another; several raylets of one machine stand for the nodes."""

import os
import warnings
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.weight_relay import readable_here
from pipeline.records import PolicyWeights

pytestmark = pytest.mark.components
SIZE = 150 * 2**20 + 3  # two whole buckets and a part


@pytest.fixture(scope="module")
def two_nodes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"num_cpus": 1, "object_store_memory": 400 * 2**20}
        cluster = Cluster(initialize_head=True, head_node_args=options)
        other = cluster.add_node(**options)
        ray.init(address=cluster.address, log_to_driver=False)
    yield ray.get_runtime_context().get_node_id(), other.node_id
    ray.shutdown()
    cluster.shutdown()


def read_on(node, weights, times=1):
    @ray.remote(num_cpus=0)
    def read():
        here = readable_here(weights)
        file = Path(here.location) / "model.safetensors"
        return here.location, here.node, file.read_bytes()

    placed = read.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
    return ray.get([placed.remote() for _ in range(times)], timeout=120)


def test_each_node_reads_the_weights_and_fetches_them_once(two_nodes, tmp_path):
    publisher, other = two_nodes

    def publish(version, data):
        location = tmp_path / "weights" / f"policy-{version:06d}"
        location.mkdir(parents=True, exist_ok=True)
        (location / "model.safetensors").write_bytes(data)
        return PolicyWeights(version=version, location=str(location), probes=(), node=publisher)

    first = publish(0, os.urandom(SIZE))
    whole = Path(first.location, "model.safetensors").read_bytes()
    [(location, node, data)] = read_on(publisher, first)
    assert (location, node) == (first.location, publisher)
    assert data == whole

    copies = read_on(other, first, times=3)
    assert {location for location, _, _ in copies} == {copies[0][0]} != {first.location}
    assert all(node == other and data == whole for _, node, data in copies)

    # A killed run's successor publishes a version of the same number: the copy of the dead one is not mistaken for it.
    [(_, _, data)] = read_on(other, publish(0, b"published again"))
    assert data == b"published again"
    [(location, _, data)] = read_on(other, publish(1, b"the next version"))
    assert data == b"the next version"
    assert [path.name for path in (tmp_path / "weights").glob("*@*")] == [Path(location).parent.name]
