"""Looking around on a cluster that is not there."""

import pytest
import ray
from ray._private import services

from cluster.running_jobs import running_cluster
from pipeline.errors import ResourceError


@pytest.mark.parametrize("noted", ["127.0.0.1:9", None])
def test_a_cluster_that_is_gone_is_noticed_before_ray_tries_for_minutes_to_connect(noted, monkeypatch):
    def connect(**_):
        raise AssertionError("ray was about to connect")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda temp_dir: noted)
    monkeypatch.setattr(ray, "init", connect)
    expected = r"no Ray cluster answers at auto: [^.]*[^.]\..* give the workspace instead of --job"
    with pytest.raises(ResourceError, match=expected), running_cluster():
        pass
