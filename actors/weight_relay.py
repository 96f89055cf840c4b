"""Published weights on the nodes that sample: they cross the network once per node, whatever the number of its workers.

The learner's first rank publishes into the shared memory of its own node. Workers there read that file; a worker on
another node first fetches a copy through Ray's object store, in buckets, and its neighbours read the copy.
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

PARTIAL_FILE = f"{POLICY_FILE}.partial"
BUCKET_BYTES = 32 * 2**20
BUCKETS_AHEAD = 4
"""Buckets on their way at once: enough to keep a network busy, and a small part of any object store."""
BUCKET_S = 120.0


def readable_here(weights: PolicyWeights) -> PolicyWeights:
    """`weights` with a location on this node: their own where they were published, a copy elsewhere.

    Raises:
        DeadlineExceeded: a bucket did not arrive in `BUCKET_S`.
        ray.exceptions.RayError: the node that published them is gone.
    """
    here = ray.get_runtime_context().get_node_id()
    if weights.node in (None, here):
        return weights
    try:
        return replace(weights, location=_copied_to(here, weights), node=here)
    except GetTimeoutError as error:
        raise DeadlineExceeded(
            f"fetching policy version {weights.version} from node {weights.node[:12]} to node {here[:12]} did not end: "
            f"nothing arrived for {BUCKET_S:g} s. That node, or the network between them, hangs or is slow; `ray "
            "status` tells whether it is alive."
        ) from error


def _copied_to(here: str, weights: PolicyWeights) -> str:
    """Where the copy lies."""
    source = os.path.join(weights.location, POLICY_FILE)
    on_source = NodeAffinitySchedulingStrategy(weights.node, soft=False)
    size, stamp = ray.get(_stat.options(scheduling_strategy=on_source).remote(source), timeout=BUCKET_S)
    published = Path(weights.location)
    # Of its own for every node, some of which may share one machine's memory.
    copies = published.parent / f"copies@{here[:12]}"
    # The stamp tells a version from one of equal number that a killed run left.
    copy = copies / f"{published.name}-{stamp}"
    copies.mkdir(parents=True, exist_ok=True)
    with _locked(f"{copies}.lock"):
        if not (copy / POLICY_FILE).exists():
            _make_place(copy)
            _fetch(source, size, copy / POLICY_FILE, on_source)
    return str(copy)


def _make_place(copy: Path) -> None:
    """The directory of a new copy. It gets the pages of the copy before the last, which nobody reads any more."""
    others = sorted((path for path in copy.parent.iterdir() if path != copy), key=lambda path: path.stat().st_mtime_ns)
    outdated = others[:-1]
    if outdated and not copy.exists():
        lent = outdated.pop()
        # First: under its new name the old file would be taken for the new version.
        if (lent / POLICY_FILE).exists():
            (lent / POLICY_FILE).replace(lent / PARTIAL_FILE)
        lent.rename(copy)
    copy.mkdir(exist_ok=True)
    for path in outdated:
        shutil.rmtree(path)


def _fetch(source: str, size: int, target: Path, on_source: NodeAffinitySchedulingStrategy) -> None:
    read = _read.options(scheduling_strategy=on_source)
    offsets = deque(range(0, size, BUCKET_BYTES))
    coming: deque[Any] = deque()
    partial = target.with_name(PARTIAL_FILE)
    partial.touch()
    with open(partial, "r+b") as file:
        while offsets or coming:
            while offsets and len(coming) < BUCKETS_AHEAD:
                coming.append(read.remote(source, offsets.popleft(), BUCKET_BYTES))
            file.write(ray.get(coming.popleft(), timeout=BUCKET_S))
        file.truncate()
    os.replace(partial, target)


@ray.remote(num_cpus=0)
def _stat(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@ray.remote(num_cpus=0)
def _read(path: str, offset: int, count: int) -> np.ndarray:
    return np.fromfile(path, dtype=np.uint8, offset=offset, count=count)


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """One worker of a node fetches, the others wait for it; the lock of a dead one is free."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
