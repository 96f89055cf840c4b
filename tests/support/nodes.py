"""A second machine for the tests that need one, and the processes of the test's own Ray."""

import time
from contextlib import suppress

import psutil
import ray
from ray.cluster_utils import Cluster


class Node:
    """A second machine, as far as Ray can tell: a raylet and its workers, which lose power together."""

    def __init__(self, num_cpus, num_gpus=0):
        self._cluster = Cluster()
        # The cluster of `local_ray`: one of its own would write itself into the address that "auto" finds.
        self._cluster.head_node = ray._private.worker.global_worker.node
        self._cluster.redis_address = self._cluster.head_node.redis_address
        # Ray itself would wait for 30 s at most.
        self._node = self._cluster.add_node(
            wait=False, num_cpus=num_cpus, num_gpus=num_gpus, object_store_memory=200 * 2**20
        )
        self.id = self._node.node_id
        deadline = time.monotonic() + 120
        while not any(node["NodeID"] == self.id and node["Alive"] for node in ray.nodes()):
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def lose_power(self):
        # Ray kills the raylet alone, and its workers leave when they notice.
        [(raylet, *_)] = [infos for kind, infos in self._node.all_processes.items() if kind == "raylet"]
        for process in psutil.Process(raylet.process.pid).children(recursive=True):
            # The raylet leaves when its agent is killed, and workers leave after it: some end before their turn here.
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._cluster.remove_node(self._node, allow_graceful=False)


def ray_processes(title, parent=None):
    """Running processes that Ray has named `ray::title...`, below a process: this one, or that of the id."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        # A process may end after it was listed: it has no name then.
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith(f"ray::{title}"):
                found.append(process)
    return found
