"""Published weights on the nodes that sample: they cross the network once per node, whatever the number of its workers.

The learner's first rank publishes into the shared memory of its own node. Workers on that node read the file. On
another node the first worker fetches a copy through Ray's object store, in buckets, and its neighbours read the copy.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import DeadlineExceeded
from pipeline.records import POLICY_FILE, PolicyWeights
from pipeline.rollouts.published_versions import await_file

PARTIAL_FILE = f"{POLICY_FILE}.partial"
FETCHED_BYTES = 32 * 2**20
"""The size of a bucket on its way between nodes."""
BUCKETS_AHEAD = 4
"""Buckets on their way at once: enough to keep a network busy, and a small part of any object store."""
FETCH_TIMEOUT_S = 120.0
"""How long the other node may take for one answer: a bucket, or the size of the file."""


def readable_here(weights: PolicyWeights) -> tuple[PolicyWeights, bool]:
    """`weights` with a location on this node: the published file itself, or a copy of it on another node.

    Returns:
        The weights, and whether this call fetched a copy; a neighbour may have fetched it before.

    Raises:
        DeadlineExceeded: a bucket, or the whole file where it follows, did not arrive in `FETCH_TIMEOUT_S`.
        ray.exceptions.RayError: the node that published them is gone.
    """
    here = ray.get_runtime_context().get_node_id()
    publisher = weights.node
    wait_s = FETCH_TIMEOUT_S if weights.file_follows else 0.0
    if publisher is None or publisher == here:
        await_file(weights.location, wait_s)
        return weights, False
    try:
        copy, is_fetched = _copy_to(here, weights.location, publisher, wait_s)
    except GetTimeoutError as error:
        raise DeadlineExceeded(
            f"fetching policy version {weights.version} from node {publisher[:12]} to node {here[:12]} did not end: "
            f"nothing arrived for {FETCH_TIMEOUT_S:g} s. Node {publisher[:12]}, or the network between the two, hangs "
            "or is slow. `ray status` shows which nodes are alive."
        ) from error
    return replace(weights, location=copy, node=here), is_fetched


def _copy_to(here: str, location: str, publisher: str, wait_s: float) -> tuple[str, bool]:
    """Fetches the published weights unless a neighbour has. Returns the directory of the copy, and whether it did."""
    source = os.path.join(location, POLICY_FILE)
    on_publisher = NodeAffinitySchedulingStrategy(publisher, soft=False)
    size, changed_ns = ray.get(
        _stat.options(scheduling_strategy=on_publisher).remote(location, wait_s), timeout=FETCH_TIMEOUT_S
    )
    published = Path(location)
    # One directory per node: two nodes of Ray may share the memory of one machine.
    copies = published.parent / f"copies@{here[:12]}"
    # The time of change distinguishes this version from one of equal number that a killed run left.
    copy = copies / f"{published.name}-{changed_ns}"
    copies.mkdir(parents=True, exist_ok=True)
    # The workers of a node come here at the same time: the first one fetches, the others find its copy.
    with _locked(f"{copies}.lock"):
        is_missing = not (copy / POLICY_FILE).exists()
        if is_missing:
            _make_place(copy)
            _fetch(source, size, copy / POLICY_FILE, on_publisher)
    return str(copy), is_missing


def _make_place(copy: Path) -> None:
    """Makes the directory of a new copy out of the copy before the last, which no worker reads any more.

    Writing over pages that exist is faster than asking for new ones (`pipeline/rollouts/policy_files.py`).
    """
    others = sorted((path for path in copy.parent.iterdir() if path != copy), key=lambda path: path.stat().st_mtime_ns)
    outdated = others[:-1]
    if outdated and not copy.exists():
        reused = outdated.pop()
        # Before the directory gets its new name: a worker would take the old file in it for the new version.
        if (reused / POLICY_FILE).exists():
            (reused / POLICY_FILE).replace(reused / PARTIAL_FILE)
        reused.rename(copy)
    copy.mkdir(exist_ok=True)
    for path in outdated:
        shutil.rmtree(path)


def _fetch(source: str, size: int, target: Path, on_publisher: NodeAffinitySchedulingStrategy) -> None:
    """Copies the file bucket by bucket. Under its own name the copy appears whole or not at all."""
    read = _read.options(scheduling_strategy=on_publisher)
    offsets = deque(range(0, size, FETCHED_BYTES))
    arriving: deque[Any] = deque()
    partial = target.with_name(PARTIAL_FILE)
    partial.touch()
    with open(partial, "r+b") as file:
        while offsets or arriving:
            while offsets and len(arriving) < BUCKETS_AHEAD:
                arriving.append(read.remote(source, offsets.popleft(), FETCHED_BYTES))
            file.write(ray.get(arriving.popleft(), timeout=FETCH_TIMEOUT_S))
        file.truncate()  # a reused file may be longer
    os.replace(partial, target)


@ray.remote(num_cpus=0)
def _stat(location: str, wait_s: float) -> tuple[int, int]:
    await_file(location, wait_s)
    status = os.stat(os.path.join(location, POLICY_FILE))
    return status.st_size, status.st_mtime_ns


@ray.remote(num_cpus=0)
def _read(path: str, offset: int, count: int) -> np.ndarray:
    return np.fromfile(path, dtype=np.uint8, offset=offset, count=count)


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Holds a lock between the processes of this machine. The lock of a process that died is free."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
