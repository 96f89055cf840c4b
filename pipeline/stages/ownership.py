"""Who holds a workspace: one job at a time, and a dead job holds nothing."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pipeline.errors import CorruptManifest, WorkspaceLocked
from pipeline.stages import storage

OWNER_FILE = "owner.json"


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The job that holds a workspace."""

    job: str
    host: str
    machine: str
    """Boot and process namespace: only within one of these does a process id mean anything."""
    pid: int
    start_ticks: int
    """Start of the process in clock ticks since boot: tells it from a later process with the same id."""
    since: str
    """When it took the workspace, local time."""

    @classmethod
    def here(cls, job: str) -> Owner:
        """This process, as owner."""
        pid = os.getpid()
        return cls(
            job=job,
            host=socket.gethostname(),
            machine=_machine(),
            pid=pid,
            start_ticks=_start_ticks(pid) or 0,
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
        )

    def is_gone(self) -> bool:
        """True only when this machine can tell that the owner's process has ended."""
        return self.machine == _machine() and _start_ticks(self.pid) != self.start_ticks

    def __str__(self) -> str:
        return f"job {self.job} (process {self.pid} on {self.host}, since {self.since})"


def read_owner(workspace: str) -> Owner | None:
    """The recorded owner of a workspace, living or dead.

    Raises:
        CorruptManifest: the record cannot be read.
    """
    uri = storage.join(workspace, OWNER_FILE)
    text = storage.read_text(uri)
    if text is None:
        return None
    try:
        values = json.loads(text)
        return Owner(**{field.name: values[field.name] for field in fields(Owner)})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CorruptManifest(
            f"{uri} cannot be read ({error!r}). Start with --take-over if no other job uses the workspace."
        ) from error


def take(workspace: str, job: str, *, take_over: bool) -> Owner:
    """Makes this process the owner. A dead owner is replaced silently, a living one only with `take_over`.

    On a local workspace a file lock lets one of two jobs that start at the same moment go first. On a remote one the
    later writer wins, and the earlier one learns of it at its next commit.

    Raises:
        WorkspaceLocked: another job holds the workspace.
        CorruptManifest: the record of the owner cannot be read.
    """
    owner = Owner.here(job)
    with _one_at_a_time(workspace):
        current = None if take_over else read_owner(workspace)
        if current is not None and not current.is_gone():
            raise WorkspaceLocked(
                f"{workspace} is held by {current}. Wait for it, choose another --workspace, or, if it is dead, "
                "start again with --take-over."
            )
        storage.write_text(storage.join(workspace, OWNER_FILE), json.dumps(asdict(owner)))
    return owner


def require_ownership(workspace: str, owner: Owner) -> None:
    """Raises WorkspaceLocked when another job has taken over since."""
    current = read_owner(workspace)
    if current != owner:
        raise WorkspaceLocked(
            f"{workspace} was taken over by {current or 'someone who removed its owner.json'}; "
            f"job {owner.job} stops here without committing."
        )


def release(workspace: str, owner: Owner) -> None:
    """Removes the record of the owner, unless another job has taken over."""
    if read_owner(workspace) == owner:
        storage.delete_file(storage.join(workspace, OWNER_FILE))


@contextmanager
def _one_at_a_time(workspace: str) -> Iterator[None]:
    if not storage.is_local(workspace):
        yield
        return
    with open(storage.join(storage.local_path(workspace), f"{OWNER_FILE}.lock"), "a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _start_ticks(pid: int) -> int | None:
    """None when there is no such process, or it has ended and was not reaped yet."""
    try:
        # The second field is the command in parentheses, which may itself hold blanks.
        after_command = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, start_ticks = after_command[0], after_command[19]
    return None if state in "ZX" else int(start_ticks)
