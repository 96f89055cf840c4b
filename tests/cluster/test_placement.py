import pytest

from cluster.placement import pack_bundles
from pipeline.errors import ResourceError


@pytest.mark.components
def test_bundles_are_reserved_together_and_given_back(local_ray):
    before = local_ray.available_resources()["CPU"]
    placement = pack_bundles(2, cpus=0.5, gpus=0, timeout_s=60, name="PPO learner")
    assert local_ray.available_resources()["CPU"] == pytest.approx(before - 1.0)
    placement.remove()


@pytest.mark.components
def test_what_is_not_free_in_time_is_a_letter(local_ray):
    with pytest.raises(ResourceError, match=r"PPO learner needs 2 x 1000 CPU and 0 GPU; after 1 s the cluster has \d"):
        pack_bundles(2, cpus=1000, gpus=0, timeout_s=1, name="PPO learner")
