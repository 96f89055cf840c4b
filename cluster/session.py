"""A Ray cluster for the length of a job: the one that runs, or one of our own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ray

from cluster.resources import StageDemand, check_plan
from pipeline.config.schema import ClusterConfig


@contextmanager
def open_cluster(config: ClusterConfig, plan: Sequence[StageDemand]) -> Iterator[None]:
    """Connects to the cluster this job was submitted to, or starts one on this machine; checks the plan first.

    A cluster that was running stays running.

    Raises:
        ResourceError: the plan does not fit; no actor has been started.
    """
    if "RAY_ADDRESS" in os.environ or ray.is_initialized():
        ray.init(ignore_reinit_error=True, log_to_driver=False)
    else:
        store = None if config.object_store_gib is None else int(config.object_store_gib * 2**30)
        ray.init(include_dashboard=False, object_store_memory=store, log_to_driver=False)
    try:
        check_plan(plan, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        yield
    finally:
        ray.shutdown()


def job_id() -> str:
    """The submitted job's id, or this process for a job run directly."""
    return os.environ.get("RAY_JOB_ID") or f"local-{os.getpid()}"
