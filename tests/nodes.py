"""A second machine for the tests that need one."""

import os
import subprocess
import sys
import time

import psutil
import ray


class Node:
    """A second machine, as far as Ray can tell: a raylet and its workers, which lose power together."""

    def __init__(self, num_cpus):
        address = ray.get_runtime_context().gcs_address
        ray_command = os.path.join(os.path.dirname(sys.executable), "ray")
        before = {node["NodeID"] for node in ray.nodes()}
        self._process = subprocess.Popen(
            [
                *(ray_command, "start", f"--address={address}", f"--num-cpus={num_cpus}", "--block"),
                *(f"--object-store-memory={200 * 2**20}", "--disable-usage-stats"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(lambda: {node["NodeID"] for node in ray.nodes() if node["Alive"]} - before)
        [self.id] = {node["NodeID"] for node in ray.nodes()} - before

    def lose_power(self):
        for process in [*psutil.Process(self._process.pid).children(recursive=True), self._process]:
            process.kill()
        self._process.wait()


def until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
