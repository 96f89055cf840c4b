"""Who holds a workspace: one job at a time, and a dead job holds nothing."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pipeline.errors import CorruptManifest, WorkspaceLocked
from pipeline.stages import storage

OWNER_FILE = "owner.json"
NOBODY = "null"
"""The record of a workspace that its owner has left. It is not deleted: no storage deletes a record on a condition."""


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
    taking: str
    """A random name of this taking: the same process may take a workspace again."""

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
            taking=uuid.uuid4().hex,
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
    text = storage.read_text(storage.join(workspace, OWNER_FILE))
    return None if text is None else _parsed(text, workspace)


def _parsed(text: str, workspace: str) -> Owner | None:
    try:
        values = json.loads(text)
        return None if values is None else Owner(**{field.name: values[field.name] for field in fields(Owner)})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CorruptManifest(
            f"{storage.join(workspace, OWNER_FILE)} cannot be read ({error!r}). Start with --take-over if no other job "
            "uses the workspace."
        ) from error


def take(workspace: str, job: str, *, take_over: bool) -> Owner:
    """Makes this process the owner. A dead owner is replaced silently, a living one only with `take_over`.

    Of jobs that start at the same moment one gets it: the record is created only where there is none, and replaced only
    while it is the one that was read. A file system that can do neither (`storage.create_text`) lets the later
    writer win, and the earlier one learns of it at its next commit.

    Raises:
        WorkspaceLocked: another job holds the workspace.
        CorruptManifest: the record of the owner cannot be read.
    """
    uri, owner = storage.join(workspace, OWNER_FILE), Owner.here(job)
    record = json.dumps(asdict(owner))
    while True:
        text = storage.read_text(uri)
        if text is None:
            taken = storage.create_text(uri, record)
        else:
            current = None if take_over else _parsed(text, workspace)
            if current is not None and not current.is_gone():
                raise WorkspaceLocked(
                    f"{workspace} is held by {current}. Wait for it, choose another --workspace, or, if it is dead, "
                    "start again with --take-over."
                )
            taken = storage.replace_text(uri, record, expected=text)
        if taken:
            return owner
        # Another job was quicker; it is read next.


def require_ownership(workspace: str, owner: Owner) -> None:
    """Raises WorkspaceLocked when another job has taken over since."""
    current = read_owner(workspace)
    if current != owner:
        raise WorkspaceLocked(
            f"{workspace} was taken over by {current or 'someone who removed its owner.json'}; "
            f"job {owner.job} stops here without committing."
        )


def release(workspace: str, owner: Owner) -> None:
    """Leaves the workspace to whoever comes next, unless another job has taken over."""
    storage.replace_text(storage.join(workspace, OWNER_FILE), NOBODY, expected=json.dumps(asdict(owner)))


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
