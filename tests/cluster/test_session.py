"""Connecting to Ray, in processes of their own: whether Ray runs is a fact of the whole process."""

import os
import subprocess
import sys

import pytest
import ray

from cluster.session import open_cluster
from pipeline.config.cluster import ClusterConfig
from pipeline.errors import ResourceError

OPEN = """
import ray
from cluster.resources import plan_resources
from cluster.session import open_cluster
from pipeline.config.cluster import ClusterConfig, RanksConfig, RolloutConfig
from pipeline.errors import ResourceError

small = ClusterConfig(
    alignment=RanksConfig(cpus_per_rank=0.1),
    rollout=RolloutConfig(cpus_per_worker=0.1),
    scoring={"cpus_per_replica": 0.1},
    object_store_gib=0.2,
)
"""

STARTS_ITS_OWN = (
    OPEN
    + """
with open_cluster(small, plan_resources(small)):
    assert ray.get_runtime_context().namespace.startswith("local-")
assert not ray.is_initialized(), "what was started must be shut down"
"""
)

LEAVES_WHAT_WAS_THERE = (
    OPEN
    + """
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20)
with open_cluster(small, plan_resources(small)):
    pass
assert ray.is_initialized(), "a Ray that was running stays"

large = small.model_copy(update={"rollout": RolloutConfig(workers=50, cpus_per_worker=1)})
try:
    with open_cluster(large, plan_resources(large)):
        raise AssertionError("entered")
except ResourceError as error:
    assert "needs 50.2 CPU and 0 GPU at once; there are 2 CPU" in str(error), error
    assert "cluster.rollout.workers=1 would fit" in str(error), error
ray.shutdown()
"""
)

NOBODY_ANSWERS = (
    OPEN
    + """
try:
    with open_cluster(small, plan_resources(small)):
        raise AssertionError("entered")
except ResourceError as error:
    assert "no Ray cluster at RAY_ADDRESS=127.0.0.1:9" in str(error), error
    assert "unset RAY_ADDRESS" in str(error), error
"""
)


@pytest.mark.components
@pytest.mark.parametrize(
    ("script", "address"),
    [(STARTS_ITS_OWN, None), (LEAVES_WHAT_WAS_THERE, None), (NOBODY_ANSWERS, "127.0.0.1:9")],
    ids=["starts its own", "leaves what was there", "nobody answers"],
)
def test_open_cluster(script, address):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {} if address is None else {"RAY_ADDRESS": address}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert run.returncode == 0, run.stderr


def test_a_ray_that_does_not_come_up_is_an_error_message(monkeypatch):
    def too_busy(**options):
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", too_busy)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with (
        pytest.raises(ResourceError, match=r"no Ray cluster on this machine: The current node timed out.*`ray start"),
        open_cluster(ClusterConfig(), ()),
    ):
        raise AssertionError("entered")
