"""A Ray cluster for the length of a job: the one that runs, or one of our own."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import services
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import vrm.own_packages as own_packages
from cluster.resources import StageDemand, check_plan
from cluster.submission import job_id
from pipeline.config.cluster import ClusterConfig
from pipeline.errors import ResourceError

CONNECT_S = 10.0
REMOVE_S = 30.0


@contextmanager
def open_cluster(config: ClusterConfig, plan: Sequence[StageDemand]) -> Iterator[None]:
    """Connects to the cluster this job was submitted to, or starts one on this machine; checks the plan first.

    A cluster that was running stays running. Every job has a Ray namespace of its own.

    Raises:
        ResourceError: no cluster answers or starts, or the plan does not fit; no actor has been started.
    """
    connected_here = not ray.is_initialized()
    if connected_here:
        _connect(config)
    try:
        check_plan(plan, node_resources())
        yield
    finally:
        if connected_here:
            ray.shutdown()


def _connect(config: ClusterConfig) -> None:
    address = os.environ.get("RAY_ADDRESS", "local")
    # By value: Ray's workers would have to find this module before they can find any.
    ray.cloudpickle.register_pickle_by_value(own_packages)
    workers: Any = {"worker_process_setup_hook": own_packages.find_own_packages_first_in_worker}
    try:
        if address == "local":
            store = None if config.object_store_gib is None else int(config.object_store_gib * 2**30)
            ray.init(
                address="local",
                namespace=job_id(),
                include_dashboard=False,
                object_store_memory=store,
                log_to_driver=False,
                runtime_env=workers,
            )
        else:
            require_listener(address)
            ray.init(address=address, namespace=job_id(), log_to_driver=False, runtime_env=workers)
    except Exception as error:  # Ray's own are bare: a raylet that is not up after 30 s on a busy machine
        place = "on this machine" if address == "local" else f"at RAY_ADDRESS={address}"
        raise ResourceError(
            f"no Ray cluster {place}: {error}. "
            "Start one with `ray start --head`, or unset RAY_ADDRESS to let the job start its own."
        ) from error


def node_resources() -> list[dict[str, float]]:
    """What each living node has in total, in use or not."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def process_logs() -> str:
    """The directory in which Ray keeps what the processes of a node print; each node has its own."""
    node = ray._private.worker._global_node
    # A driver behind ray:// stands on no node.
    return "/tmp/ray/session_latest/logs" if node is None else node.get_logs_dir_path()


def remove_from_nodes(directory: str) -> None:
    """Deletes a local directory on this node, and on the others as far as they can be reached."""
    shutil.rmtree(directory, ignore_errors=True)
    here = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    if others:
        remove: Any = ray.remote(num_cpus=0)(shutil.rmtree)
        removals = [
            remove.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(directory, True)
            for node in others
        ]
        ray.wait(removals, num_returns=len(removals), timeout=REMOVE_S)


def require_listener(address: str) -> None:
    """Ray itself takes minutes to notice that nobody listens at host:port.

    Raises:
        OSError: nobody does; or there is no cluster on this machine, for "auto".
    """
    if address == "auto":
        # The cluster that `ray start` last noted here, which may be gone.
        address = services.canonicalize_bootstrap_address(address) or address
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
