"""The files of the versions that a learner publishes: written at once, or behind a transfer that does not need them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from pipeline.models.tensor_stream import TensorStream
from pipeline.records import POLICY_FILE
from pipeline.rollouts.policy_files import PolicyFiles

POLL_S = 0.02
"""How often a reader looks for a file that is still being written."""


class PublishedVersions:
    """Writes the last two versions of a policy into one directory; each rank of a learner has one, for one thread.

    Only one rank writes. The others follow what is due, because all must read the tensors together.

    A version that GPUs send to the engines needs its file only where an engine comes late. `write_behind` copies its
    tensors to host memory while they are sent, and a thread writes them. Nothing waits for the thread but a reader
    (`await_file`) and the next version.
    """

    def __init__(self, directory: str, *, writes: bool = True) -> None:
        """`writes`: whether this is the rank that writes."""
        self._directory = Path(directory)
        self._writes = writes
        self._files = PolicyFiles()
        self._due: int | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="published policy")
        self._writing: Future[float] | None = None

    def location(self, version: int) -> Path:
        return self._directory / f"policy-{version:06d}"

    def write(self, version: int, policy: TensorStream) -> float:
        """Writes a version, and removes all but this one and the one before it. Returns GB/s."""
        self.finish()
        return self._write(version, policy)

    def announce(self, version: int) -> None:
        """The file of this version will be written behind its transfer. Until then it has none."""
        self.finish()
        if self._writes:
            # A killed run may have left a version of the same number.
            (self.location(version) / POLICY_FILE).unlink(missing_ok=True)
        self._due = version

    @property
    def is_due(self) -> bool:
        """A version was announced, and nobody has its tensors yet."""
        return self._due is not None

    def write_behind(
        self, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Passes the tensors on. Once all have passed, a thread writes the version that was announced.

        The policy may change as soon as the last tensor has passed.
        """
        copies = {}
        version = self._due
        for name, tensor in tensors:
            if self._writes and version is not None:
                copies[name] = tensor.detach().to("cpu", dtype, copy=True)
            yield name, tensor
        if self._writes and version is not None:
            self._writing = self._writer.submit(self._write, version, TensorStream.of(copies))
        self._due = None

    def finish(self) -> None:
        """Waits for the thread.

        Raises:
            ResourceError: the file system has too little room for the version behind a transfer.
        """
        writing, self._writing, self._due = self._writing, None, None
        if writing is not None:
            writing.result()

    def _write(self, version: int, policy: TensorStream) -> float:
        location = self.location(version)
        written = self._files.write(policy, location, replaced=self.location(version - 2))
        # By name, not by age: a killed run may have left later versions than the one it resumes from.
        kept = {location, self.location(version - 1)}
        for other in set(self._directory.glob("policy-*")) - kept:
            shutil.rmtree(other, ignore_errors=True)
        return written


def await_file(location: str, timeout_s: float) -> None:
    """Waits until the file of a published version is there; gives up after `timeout_s`, and leaves it to the reader."""
    give_up, file = time.monotonic() + timeout_s, Path(location) / POLICY_FILE
    while not file.exists() and time.monotonic() < give_up:
        time.sleep(POLL_S)
