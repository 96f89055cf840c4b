"""Which jobs of a cluster have rollout workers now, and in which workspaces they work.

A job's Ray namespace is its submission id, and the names of its rollout workers tell the workspace. Both live and die
with the job, so nothing needs to be written down and nothing can be left over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from cluster.session import require_listener
from pipeline.errors import ResourceError, WorkspaceError

SEPARATOR = " in "


def actor_name(worker: str, workspace: str) -> str:
    """What a rollout worker is called on the cluster; `worker` is unique within the job."""
    return f"{worker}{SEPARATOR}{workspace}"


def workspace_of(job: str) -> str:
    """The workspace of a running job that has rollout workers.

    Raises:
        WorkspaceError: there is no such job; lists those there are.
    """
    running = jobs_with_rollout_workers()
    if job not in running:
        known = "".join(f"\n  {known}: {workspace}" for known, workspace in sorted(running.items()))
        raise WorkspaceError(
            f"job {job!r} has no rollout workers on this cluster: it is unknown, has ended, or has not come so far. "
            + (f"Jobs that have some:{known}" if known else "No other job has any.")
        )
    return running[job]


def jobs_with_rollout_workers() -> dict[str, str]:
    """job -> workspace."""
    return {
        actor["namespace"]: actor["name"].partition(SEPARATOR)[2]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["name"].startswith("rollout worker ") and SEPARATOR in actor["name"]
    }


@contextmanager
def running_cluster() -> Iterator[None]:
    """Connects to the cluster at RAY_ADDRESS, or to the one that runs on this machine, to look around.

    Raises:
        ResourceError: no cluster answers.
    """
    address = os.environ.get("RAY_ADDRESS", "auto")
    try:
        require_listener(address)
        ray.init(address=address, log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"no Ray cluster answers at {address}: {str(error).rstrip('.')}. Set RAY_ADDRESS to the job's cluster, or "
            "give the workspace instead of --job."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
