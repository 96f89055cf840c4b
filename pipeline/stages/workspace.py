"""Where results live: a workspace of stage directories, each committed by its manifest.

    <workspace>/
      owner.json                          the job that holds the workspace
      stages/<name>-<fingerprint[:12]>/
        manifest.json                     written last: the stage is finished
        result/                           what later stages read
        checkpoints/step-000009/          a resumable state ...
        checkpoints/step-000009.json      ... and its commit, written after it
        metrics.jsonl, tensorboard/

One idea serves both levels of resume: the manifest is the commit. Whatever has none does not exist.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import psutil

from pipeline.errors import CorruptManifest, WorkspaceError, WorkspaceLocked
from pipeline.records import Metrics, StageResult
from pipeline.stages import storage
from pipeline.stages.metrics_log import MetricsLog

OWNER_FILE = "owner.json"
MANIFEST_FILE = "manifest.json"
COMMIT = re.compile(r"step-(\d{6})\.json")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A committed, resumable state: everything after `step` was done."""

    step: int
    uri: str
    state: dict[str, Any]
    """What the loop itself needs to go on, such as the KL coefficient."""


class CheckpointStore:
    """The checkpoints of one stage. A directory without a commit is the rest of a killed save and is never read."""

    def __init__(self, uri: str, *, keep: int) -> None:
        self._uri = uri
        self._keep = keep

    def uri(self, step: int) -> str:
        """Where the ranks write the state after `step`."""
        return storage.join(self._uri, f"step-{step:06d}")

    def commit(self, step: int, state: dict[str, Any]) -> None:
        """Makes the state after `step` the latest, then deletes all but the newest `keep` and every uncommitted rest."""
        storage.write_text(f"{self.uri(step)}.json", json.dumps({"step": step, "state": state}))
        committed = self._committed_steps()
        for name in storage.list_directories(self._uri):
            if int(name.removeprefix("step-")) not in committed[-self._keep :]:
                storage.delete_file(storage.join(self._uri, f"{name}.json"))
                storage.delete_directory(storage.join(self._uri, name))

    def latest(self) -> Checkpoint | None:
        """The newest committed checkpoint.

        Raises:
            CorruptManifest: its commit cannot be read.
        """
        steps = self._committed_steps()
        if not steps:
            return None
        commit = f"{self.uri(steps[-1])}.json"
        values = _read_json(commit, cure=f"Delete {commit} to resume from the checkpoint before it.")
        return Checkpoint(step=values["step"], uri=self.uri(steps[-1]), state=values["state"])

    def _committed_steps(self) -> list[int]:
        names = storage.list_directories(self._uri)
        return [
            int(name.removeprefix("step-"))
            for name in names
            if storage.read_text(storage.join(self._uri, f"{name}.json")) is not None
        ]


class StageDirectory:
    """The place of one stage result."""

    def __init__(self, uri: str, name: str, fingerprint: str, *, keep_checkpoints: int = 2) -> None:
        self.uri = uri
        self.name = name
        self.fingerprint = fingerprint
        self.result_uri = storage.join(uri, "result")
        self.checkpoints = CheckpointStore(storage.join(uri, "checkpoints"), keep=keep_checkpoints)

    def result(self) -> StageResult | None:
        """The finished result, or None.

        Raises:
            CorruptManifest: there is a manifest, but it cannot be read.
        """
        uri = storage.join(self.uri, MANIFEST_FILE)
        if storage.read_text(uri) is None:
            return None
        manifest = _read_json(uri, cure=f"Delete {uri} to compute the stage again from its last checkpoint.")
        return StageResult(
            name=self.name, fingerprint=manifest["fingerprint"], location=self.result_uri, metrics=manifest["metrics"]
        )

    def finish(self, metrics: Metrics, details: dict[str, Any]) -> StageResult:
        """Commits the stage: writes the manifest last, then drops the checkpoints."""
        manifest = {"name": self.name, "fingerprint": self.fingerprint, "metrics": metrics, **details}
        storage.write_text(storage.join(self.uri, MANIFEST_FILE), json.dumps(manifest, indent=2))
        storage.delete_directory(storage.join(self.uri, "checkpoints"))
        return StageResult(
            name=self.name, fingerprint=self.fingerprint, location=self.result_uri, metrics=metrics
        )

    def manifest(self) -> dict[str, Any]:
        """The whole manifest of a finished stage."""
        return _read_json(storage.join(self.uri, MANIFEST_FILE), cure="Run the stage first.")

    def metrics_log(self, num_steps: int, first_step: int) -> MetricsLog:
        return MetricsLog(self.metrics_directory, self.name, num_steps=num_steps, first_step=first_step)

    @property
    def metrics_directory(self) -> str:
        """Local: metrics are appended to, which object stores cannot do; a remote workspace gets them at the end."""
        if storage.is_local(self.uri):
            return storage.local_path(self.uri)
        return os.path.join(os.path.expanduser("~/.cache/vrm-pipeline/metrics"), self.fingerprint)


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The job that holds a workspace."""

    job: str
    host: str
    pid: int
    started: float
    """Start of the process, seconds since 1970: tells it from a later process with the same id."""

    @classmethod
    def here(cls, job: str) -> Owner:
        process = psutil.Process()
        return cls(job=job, host=socket.gethostname(), pid=process.pid, started=process.create_time())

    def is_gone(self) -> bool:
        """True when this host can tell that the owner's process has ended."""
        if self.host != socket.gethostname():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) > 1.0
        except psutil.NoSuchProcess:
            return True


class Workspace:
    """A directory held by one job at a time."""

    def __init__(self, uri: str, owner: Owner) -> None:
        self.uri = uri
        self._owner = owner

    @classmethod
    def open(cls, uri: str, *, job: str, take_over: bool = False) -> Workspace:
        """Takes the workspace for this process, or says who has it.

        Raises:
            WorkspaceLocked: another living job holds it.
            WorkspaceError: it cannot be written.
        """
        owner_uri = storage.join(uri, OWNER_FILE)
        text = storage.read_text(owner_uri)
        if text is not None and not take_over:
            holder = Owner(**_read_json(owner_uri, cure="Start with --take-over if no other job uses the workspace."))
            if not holder.is_gone() and holder.pid != os.getpid():
                since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.started))
                raise WorkspaceLocked(
                    f"{uri} is held by job {holder.job} (process {holder.pid} on {holder.host}, since {since}). "
                    "Wait for it, choose another --workspace, or, if it is dead, start with --take-over."
                )
        owner = Owner.here(job)
        try:
            storage.write_text(owner_uri, json.dumps(asdict(owner)))
        except OSError as error:
            raise WorkspaceError(f"{uri} cannot be written: {error}. Choose another --workspace.") from error
        return cls(uri, owner)

    def stage(self, name: str, fingerprint: str, *, keep_checkpoints: int = 2) -> StageDirectory:
        uri = storage.join(self.uri, "stages", f"{name}-{fingerprint[:12]}")
        return StageDirectory(uri, name, fingerprint, keep_checkpoints=keep_checkpoints)

    def close(self) -> None:
        """Lets go, unless another job took over meanwhile."""
        owner_uri = storage.join(self.uri, OWNER_FILE)
        text = storage.read_text(owner_uri)
        if text is not None and json.loads(text) == asdict(self._owner):
            storage.delete_file(owner_uri)

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_json(uri: str, *, cure: str) -> dict[str, Any]:
    text = storage.read_text(uri)
    try:
        values = json.loads(text or "")
    except json.JSONDecodeError as error:
        raise CorruptManifest(f"{uri} cannot be read ({error}). {cure}") from error
    if not isinstance(values, dict):
        raise CorruptManifest(f"{uri} holds {values!r:.60}, not an object. {cure}")
    return values
