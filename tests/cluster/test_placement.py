import pytest

from cluster.placement import pack_bundles
from pipeline.errors import ResourceError


@pytest.mark.components
def test_bundles_are_reserved_and_given_back(local_ray):
    for _ in range(3):
        # Each round asks for most of the machine: the second would wait for ever, had the first not been given back.
        placement = pack_bundles(2, cpus=1.5, gpus=0, timeout_s=60, name="PPO learner")
        assert placement.strategy(1).placement_group_bundle_index == 1
        placement.remove()


@pytest.mark.components
def test_what_is_not_free_in_time_is_an_error_message(local_ray):
    with pytest.raises(ResourceError, match=r"PPO learner needs 2 x 1000 CPU and 0 GPU; after 1 s the cluster has \d"):
        pack_bundles(2, cpus=1000, gpus=0, timeout_s=1, name="PPO learner")
