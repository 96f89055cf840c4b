"""A second machine for the tests that need one."""

import ray
from ray.cluster_utils import Cluster


class Node:
    """A second machine, as far as Ray can tell: a raylet and its workers, which lose power together."""

    def __init__(self, num_cpus):
        self._cluster = Cluster()
        # The cluster of `local_ray`: one of its own would write itself into the address that "auto" finds.
        self._cluster.head_node = ray._private.worker.global_worker.node
        self._cluster.redis_address = self._cluster.head_node.redis_address
        self._node = self._cluster.add_node(num_cpus=num_cpus, object_store_memory=200 * 2**20)
        self.id = self._node.node_id

    def lose_power(self):
        self._cluster.remove_node(self._node, allow_graceful=False)
