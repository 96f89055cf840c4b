"""Published policies as files: what a learner writes and engines of the same node read, at the speed of memory."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
from itertools import islice
from pathlib import Path

import torch

from pipeline.errors import CheckpointError, ResourceError
from pipeline.models.safetensors_pieces import LENGTH, SAFETENSORS_DTYPES, safetensors_header
from pipeline.models.tensor_stream import TensorStream
from pipeline.records import POLICY_FILE

VERSIONS = 2
"""Files on a node: engines read one while the learner writes the other."""


class PolicyFiles:
    """Writes and reads safetensors files through mappings of them, which it keeps.

    In a virtual machine a page of shared memory costs more to find than to fill, for a file as for a mapping of it. So
    a new version is written over the pages of a version that no process reads any more, and every process keeps its
    mappings. There are never more than `VERSIONS` files, used in turn.
    """

    def __init__(self) -> None:
        self._mapped: dict[tuple[int, int, int], torch.Tensor] = {}

    def write(self, policy: TensorStream, location: str | Path, *, replaced: str | Path | None = None) -> float:
        """One safetensors file with the policy's names, appearing whole or not at all.

        Every tensor is copied once, from the device it is on to the file, before the next is asked for.

        Args:
            replaced: directory of an outdated version; the file takes over its pages.

        Returns:
            How fast the file was written, GB/s, with the time that the tensors took to come.

        Raises:
            ResourceError: the file system has too little room left, as /dev/shm in a container often has.
        """
        started, location = time.perf_counter(), Path(location)
        if replaced is not None and Path(replaced).exists() and Path(replaced) != location:
            shutil.rmtree(location, ignore_errors=True)
            Path(replaced).rename(location)
        location.mkdir(parents=True, exist_ok=True)
        whole, partial = location / POLICY_FILE, location / f"{POLICY_FILE}.partial"
        if whole.exists():
            whole.replace(partial)
        header = safetensors_header(policy.outline)
        num_bytes = len(header) + sum(tensor.nbytes for tensor in policy.outline.values())
        _make_room(partial, num_bytes)
        with open(partial, "r+b", buffering=0) as file:
            file.write(header)  # not through the mapping: the file's time of change tells versions apart
        target, end = self._map(partial), len(header)
        for name, (found, tensor) in zip(policy.outline, policy.tensors, strict=True):
            assert found == name, f"{found} came where {name} was due"
            begin, end = end, end + tensor.nbytes
            target[begin:end].copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
        os.replace(partial, whole)
        return num_bytes / 1e9 / (time.perf_counter() - started)

    def read(self, location: str | Path) -> dict[str, torch.Tensor]:
        """The tensors of a version as views of its file: they change when a later version is written over it.

        Raises:
            CheckpointError: the file is not on this node.
        """
        path = Path(location) / POLICY_FILE
        if not path.is_file():
            raise CheckpointError(
                f"no published weights at {str(path)!r} on node {os.uname().nodename}. Rollout workers read "
                "what the learner's first rank writes: put both on one node, or publish where both can read."
            )
        data = self._map(path)
        [length] = LENGTH.unpack(data[: LENGTH.size].numpy().tobytes())
        begin = LENGTH.size + length
        entries = json.loads(data[LENGTH.size : begin].numpy().tobytes())
        return {name: _view(data[begin:], **entry) for name, entry in entries.items() if name != "__metadata__"}

    def _map(self, path: Path) -> torch.Tensor:
        """The file's bytes [size], shared with every process that maps it."""
        status = os.stat(path)
        # By inode, not by name: versions change their names, and the inode of a mapped file is not given away.
        key = (status.st_dev, status.st_ino, status.st_size)
        mapped = self._mapped.pop(key, None)
        if mapped is None:
            mapped = torch.from_file(str(path), shared=True, size=status.st_size, dtype=torch.uint8)
        self._mapped[key] = mapped
        for outdated in [*islice(self._mapped, max(0, len(self._mapped) - VERSIONS))]:
            del self._mapped[outdated]
        return mapped


def _make_room(file: Path, num_bytes: int) -> None:
    """Gives the file its size, all of it backed by pages: without one, a write through a mapping kills the process."""
    status = file.stat() if file.exists() else None
    allocated = status.st_blocks * 512 if status else 0
    if status and status.st_size == num_bytes <= allocated:
        return
    free = shutil.disk_usage(file.parent).free
    full = ResourceError(
        f"publishing the policy's weights needs {num_bytes / 2**20:,.0f} MiB, {file.parent.parent} has "
        f"{free / 2**20:,.0f} MiB free. Enlarge it to hold two versions of the policy (docker run --shm-size, "
        "or mount -o remount,size=... /dev/shm), or delete what else lies there."
    )
    if num_bytes - allocated > free:
        raise full
    file.touch()
    with open(file, "r+b", buffering=0) as opened:
        opened.truncate(num_bytes)
        try:
            os.posix_fallocate(opened.fileno(), 0, num_bytes)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise full from error


def _view(data: torch.Tensor, *, dtype: str, shape: list[int], data_offsets: list[int]) -> torch.Tensor:
    """One tensor of a file's data; the arguments are those of its entry in the header."""
    begin, end = data_offsets
    assert end - begin == math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize, "not a file that PolicyFiles wrote"
    return data[begin:end].view(SAFETENSORS_DTYPES[dtype]).view(shape)
