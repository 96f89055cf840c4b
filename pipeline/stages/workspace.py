"""Where results live: a workspace of stage directories, each committed by its manifest.

    <workspace>/
      owner.json                          the job that holds the workspace
      libraries.log                       what libraries printed in the driver
      stages/<name>-<fingerprint[:12]>/
        manifest.json                     written last: the stage is finished
        progress.json                     how many steps it will take
        time.json                         how long all its attempts have taken
        result/                           what later stages read
        checkpoints/step-000009/          a resumable state ...
        checkpoints/step-000009.json      ... and its commit, written after it
        metrics.jsonl, tensorboard/
        profile/step-000002/              what driver, rank and engine did in a step that the recipe has recorded
        logger-<name>.txt                 the run in each logger, which a resumed stage continues
      reference_logprobs/<hash>/            what direct alignments share (pipeline/learning/reference_logprobs.py)

One idea serves both levels of resume: the manifest is the commit. Whatever has none does not exist.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

from pipeline.errors import CorruptManifest, Preempted
from pipeline.ports import Snapshot
from pipeline.records import Metrics, StageResult
from pipeline.stages import ownership, storage
from pipeline.stages.metrics_log import METRICS_FILE, MetricsLog, parse_metrics, read_metrics
from pipeline.stages.ownership import Owner
from pipeline.stages.preemption import PreemptionNotice, WaitCutShort
from pipeline.stages.stage_spec import StageSpec
from pipeline.tracking.stage_loggers import RunIds, StageLogging, start_loggers

MANIFEST_FILE = "manifest.json"
PROGRESS_FILE = "progress.json"
TIME_FILE = "time.json"
RUN_ID_FILE = "logger-{}.txt"
CHECKPOINT = re.compile(r"step-(\d{6,})")
LEAST_FREE_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A committed, resumable state: everything after `step` was done."""

    step: int
    uri: str
    state: dict[str, Any]
    """What the loop itself needs to continue, such as the KL coefficient."""


def _always() -> None:
    """Allows every commit: the workspace has no owner to ask."""


NO_NOTICE = PreemptionNotice()
"""A notice that is never given: no signal is watched."""


class CheckpointStore:
    """The checkpoints of one stage. A directory without a commit is left over from a killed save and is never read."""

    def __init__(
        self, uri: str, *, keep: int, keep_best: str | None = None, before_commit: Callable[[], None] = _always
    ) -> None:
        """
        Args:
            keep: how many of the newest commits are kept.
            keep_best: a metric of `state["metrics"]`; the commit where it is highest is kept as well. With a minus in
                front, the commit where it is lowest.
        """
        self._uri = uri
        self._keep = keep
        self._keep_best = keep_best
        self._before_commit = before_commit
        self._save_thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def uri(self, step: int) -> str:
        """Where the ranks write the state after `step`."""
        return storage.join(self._uri, f"step-{step:06d}")

    def commit_uri(self, step: int) -> str:
        """The file that says the state after `step` is whole."""
        return storage.join(self._uri, f"step-{step:06d}.json")

    def save(self, step: int, snapshot: Callable[[], Snapshot], state: dict[str, Any]) -> None:
        """Copies the state after `step`, and writes and commits it while training continues.

        Waits for the save before, so that host memory holds one copy at a time.

        Raises:
            PipelineError: the save before this one failed.
        """
        self.settle()
        copy = snapshot()

        def write_and_commit() -> None:
            try:
                copy.write(self.uri(step))
                self.commit(step, state)
            except BaseException as error:
                self._error = error

        # A daemon: the process may end without it, for a save that was cut short has no commit.
        self._save_thread = threading.Thread(target=write_and_commit, name=f"save step {step}", daemon=True)
        self._save_thread.start()

    def settle(self) -> None:
        """Waits for a save that still runs; raises what made it fail."""
        if self._save_thread is not None:
            self._save_thread.join()
            self._save_thread = None
        self.require_sound()

    def require_sound(self) -> None:
        """Raises what made the last save fail, if that is known already. To be called at every step."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def commit(self, step: int, state: dict[str, Any]) -> None:
        """Makes the state after `step` the latest, then deletes all others but the newest `keep` and the best."""
        storage.make_durable(self.uri(step))
        self._before_commit()
        storage.write_text(self.commit_uri(step), json.dumps({"step": step, "state": state}))
        best = self._best()
        kept = self._committed_steps()[-self._keep :]
        self._delete_all_but(kept if best is None else [best.step, *kept])

    def amend(self, step: int, state: dict[str, Any]) -> bool:
        """Replaces what the loop noted at the commit of `step`; False where that step has no commit.

        Waits for a save that runs, which may be the one of that step.
        """
        self.settle()
        if step not in self._committed_steps():
            return False
        self._before_commit()
        storage.write_text(f"{self.uri(step)}.json", json.dumps({"step": step, "state": state}))
        return True

    def better_than(self, metrics: Metrics) -> Checkpoint | None:
        """The best checkpoint, if `keep_best` prefers it to a model with these metrics. Waits for a save that runs."""
        self.settle()
        best = self._best()
        return best if best is not None and self._merit(best.state["metrics"]) > self._merit(metrics) else None

    def _best(self) -> Checkpoint | None:
        """The committed checkpoint that `keep_best` prefers; of equally good ones the newest."""
        if self._keep_best is None:
            return None
        commits = [self._read(step) for step in self._committed_steps()]
        return max(commits, key=lambda commit: (self._merit(commit.state["metrics"]), commit.step), default=None)

    def _merit(self, metrics: Metrics) -> float:
        """Larger is better. A commit after a preemption notice may lack the metric: then it is the worst."""
        assert self._keep_best is not None
        sign = -1.0 if self._keep_best.startswith("-") else 1.0
        return sign * metrics.get(self._keep_best.removeprefix("-"), -sign * math.inf)

    def latest(self, *, before: int | None = None) -> Checkpoint | None:
        """The newest committed checkpoint, of a step below `before` if given. Waits for a save that runs.

        Raises:
            CorruptManifest: its commit cannot be read.
        """
        self.settle()
        steps = [step for step in self._committed_steps() if before is None or step < before]
        if not steps:
            return None
        return self._read(steps[-1])

    def _read(self, step: int) -> Checkpoint:
        commit = self.commit_uri(step)
        remedy = f"Delete {commit} to resume from the checkpoint before it."
        values = _read_record(commit, keys=("step", "state"), remedy=remedy)
        return Checkpoint(step=values["step"], uri=self.uri(step), state=values["state"])

    def delete_uncommitted(self) -> None:
        """Removes what killed saves left, so that a new save never mixes with an old one."""
        with contextlib.suppress(Exception):  # why the last attempt failed is known, and it starts again
            self.settle()
        self._delete_all_but(self._committed_steps())

    def delete(self) -> None:
        """Removes all checkpoints of the stage."""
        storage.delete_directory(self._uri)

    def _delete_all_but(self, kept: Sequence[int]) -> None:
        for step in set(self._steps()) - set(kept):
            # The commit goes first: a checkpoint half deleted must not look like one.
            storage.delete_file(self.commit_uri(step))
            storage.delete_directory(self.uri(step))

    def _committed_steps(self) -> list[int]:
        return [step for step in self._steps() if storage.read_text(self.commit_uri(step)) is not None]

    def _steps(self) -> list[int]:
        matches = (CHECKPOINT.fullmatch(name) for name in storage.list_directories(self._uri))
        return sorted(int(match[1]) for match in matches if match)


class StageDirectory:
    """The place of one stage result."""

    def __init__(
        self,
        uri: str,
        name: str,
        fingerprint: str,
        *,
        keep_checkpoints: int = 2,
        keep_best: str | None = None,
        require_ownership: Callable[[], None] = _always,
        notice: PreemptionNotice = NO_NOTICE,
        logging: StageLogging | None = None,
    ) -> None:
        self.uri = uri
        self.name = name
        self.fingerprint = fingerprint
        self.result_uri = storage.join(uri, "result")
        self._require_ownership = require_ownership
        self._notice = notice
        self._logging = logging or StageLogging()
        self.checkpoints = CheckpointStore(
            storage.join(uri, "checkpoints"),
            keep=keep_checkpoints,
            keep_best=keep_best,
            before_commit=self._before_commit,
        )

    @classmethod
    def shared(cls, root: str, spec: StageSpec) -> StageDirectory:
        """The place of a stage below a directory that no job holds."""
        return cls(
            stage_uri(root, spec.name, spec.fingerprint),
            spec.name,
            spec.fingerprint,
            keep_checkpoints=spec.keep_checkpoints,
            keep_best=spec.keep_best,
        )

    def result(self) -> StageResult | None:
        """The finished result, or None.

        Raises:
            CorruptManifest: there is a manifest, but it cannot be read.
        """
        uri = storage.join(self.uri, MANIFEST_FILE)
        if storage.read_text(uri) is None:
            return None
        manifest = self.manifest()
        return StageResult(
            name=self.name, fingerprint=manifest["fingerprint"], location=self.result_uri, metrics=manifest["metrics"]
        )

    def is_commit_due(self, step: int, *, every: int) -> bool:
        """True every so many steps, and when this process was asked to end."""
        return (step + 1) % every == 0 or self._notice.is_given()

    def leave_if_preempted(self, step: int | None = None) -> None:
        """To be called after the save of `step`, or by a stage that saves nothing before its end.

        Raises:
            Preempted: this process was asked to end, and the step is committed.
        """
        if self._notice.is_given():
            self.checkpoints.settle()
            outcome = "starts again from its beginning" if step is None else f"is committed after step {step + 1}"
            raise Preempted(f"asked to end: {self.name} {outcome}. The same command resumes.")

    @contextlib.contextmanager
    def given_up_if_preempted(self, step: int, save: Callable[[int], None]) -> Iterator[None]:
        """Around the part of `step` that only reads the learner: a notice inside it ends the step.

        Args:
            save: saves the state after a step; called for the step before, unless that is committed.

        Raises:
            Preempted: this process was asked to end, and the step before is committed.
        """
        with contextlib.suppress(WaitCutShort):
            yield
        if self._notice.is_given():
            committed = self.checkpoints.latest()
            if step > 0 and (committed is None or committed.step < step - 1):
                save(step - 1)
            self.leave_if_preempted(step - 1 if step > 0 else None)

    def cut_short_if_preempted(self) -> contextlib.AbstractContextManager[None]:
        """Around the wait for rollouts, inside `given_up_if_preempted`: the notice ends the wait."""
        return self._notice.cutting_short()

    def give_up_if_preempted(self) -> None:
        """Between two calls inside `given_up_if_preempted`: after the notice the second is not made."""
        self._notice.end_if_given()

    def delete_uncommitted(self) -> None:
        """Removes what a killed run left behind without a commit: a half-exported result, a half-saved checkpoint."""
        storage.delete_directory(self.result_uri)
        self.checkpoints.delete_uncommitted()

    def finish(self, metrics: Metrics, details: dict[str, Any]) -> StageResult:
        """Commits the stage: writes the manifest last, then drops the checkpoints."""
        self.checkpoints.settle()
        storage.make_durable(self.result_uri)
        self._before_commit()
        manifest = {"name": self.name, "fingerprint": self.fingerprint, "metrics": metrics, **details}
        storage.write_text(storage.join(self.uri, MANIFEST_FILE), json.dumps(manifest, indent=2))
        self.checkpoints.delete()
        return StageResult(name=self.name, fingerprint=self.fingerprint, location=self.result_uri, metrics=metrics)

    def manifest(self) -> dict[str, Any]:
        """The whole manifest of a finished stage.

        Raises:
            CorruptManifest: it cannot be read.
        """
        uri = storage.join(self.uri, MANIFEST_FILE)
        remedy = f"Delete {uri} to compute the stage again from its last checkpoint."
        return _read_record(uri, keys=("name", "fingerprint", "metrics"), remedy=remedy)

    def metrics_log(self, num_steps: int, first_step: int) -> MetricsLog:
        """Opens the stage's metrics after its last commit, and records how many steps there will be."""
        storage.write_text(storage.join(self.uri, PROGRESS_FILE), json.dumps({"num_steps": num_steps}))
        if first_step > 0:
            # The copy of the last commit, not what another attempt may have left on this machine.
            self._fetch_metrics()
        start = partial(
            start_loggers,
            self._logging,
            self.name,
            self.metrics_directory,
            first_step=first_step,
            run_ids=RunIds(read=self._read_run_id, write=self._write_run_id),
        )
        return MetricsLog(
            self.metrics_directory, self.name, num_steps=num_steps, first_step=first_step, start_loggers=start
        )

    def _read_run_id(self, logger: str) -> str | None:
        return storage.read_text(storage.join(self.uri, RUN_ID_FILE.format(logger)))

    def _write_run_id(self, logger: str, run_id: str) -> None:
        storage.write_text(storage.join(self.uri, RUN_ID_FILE.format(logger)), run_id)

    def metrics_rows(self) -> list[dict[str, Any]]:
        """The rows written so far; empty for a stage that has written none."""
        path = os.path.join(self.metrics_directory, METRICS_FILE)
        local = read_metrics(path) if os.path.exists(path) else []
        if storage.is_local(self.uri):
            return local
        # The copy was made at the last commit: the machine that writes has more rows, one that wrote before has fewer.
        copy = parse_metrics(storage.read_text(storage.join(self.uri, "metrics", METRICS_FILE)) or "")
        return max(local, copy, key=len)

    def num_steps(self) -> int | None:
        """How many steps the stage takes; None before its first step."""
        uri = storage.join(self.uri, PROGRESS_FILE)
        if storage.read_text(uri) is None:
            return None
        return _read_record(uri, keys=("num_steps",), remedy=f"Delete {uri}; it only serves the display.")["num_steps"]

    def seconds_spent(self) -> float:
        """Wall time of all attempts so far, as it was last written down; 0 for a stage that was never computed."""
        uri = storage.join(self.uri, TIME_FILE)
        if storage.read_text(uri) is None:
            return 0.0
        return float(
            _read_record(uri, keys=("seconds",), remedy=f"Delete {uri}; it only serves the display.")["seconds"]
        )

    def record_seconds(self, seconds: float) -> None:
        """Writes down the wall time of all attempts so far."""
        storage.write_text(storage.join(self.uri, TIME_FILE), json.dumps({"seconds": seconds}))

    @property
    def metrics_directory(self) -> str:
        """A local directory: object stores cannot append. A remote workspace gets a copy at every commit."""
        return local_directory(self.uri)

    def _before_commit(self) -> None:
        self._require_ownership()
        if not storage.is_local(self.uri) and os.path.isdir(self.metrics_directory):
            storage.copy(self.metrics_directory, storage.join(self.uri, "metrics"))

    def _fetch_metrics(self) -> None:
        copy = storage.join(self.uri, "metrics")
        if not storage.is_local(self.uri) and storage.read_text(storage.join(copy, METRICS_FILE)) is not None:
            storage.copy(copy, self.metrics_directory)


class Workspace:
    """A directory held by one job at a time."""

    def __init__(
        self,
        uri: str,
        owner: Owner,
        *,
        notice: PreemptionNotice = NO_NOTICE,
        logging: StageLogging | None = None,
    ) -> None:
        self.uri = uri
        self.notice = notice
        self._owner = owner
        self._logging = logging or StageLogging()

    @classmethod
    def open(
        cls,
        uri: str,
        *,
        job: str,
        take_over: bool = False,
        needs_bytes: int = LEAST_FREE_BYTES,
        notice: PreemptionNotice = NO_NOTICE,
        logging: StageLogging | None = None,
    ) -> Workspace:
        """Takes the workspace for this process.

        Args:
            uri: a local path or a URI, as `storage` knows them; without credentials.
            job: the name of this job in messages to other jobs.
            take_over: take it from a living owner too.
            needs_bytes: estimate of what the run will write.
            notice: that this process is about to be ended.
            logging: the loggers of its stages; TensorBoard unless given.

        Raises:
            WorkspaceLocked: another living job holds it.
            WorkspaceError: it cannot be written, or has too little space.
        """
        storage.require_writable(uri, needs_bytes=needs_bytes)
        return cls(uri, ownership.take(uri, job, take_over=take_over), notice=notice, logging=logging)

    def stage(
        self,
        name: str,
        fingerprint: str,
        *,
        keep_checkpoints: int = 2,
        keep_best: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> StageDirectory:
        """
        Args:
            config: the part of the recipe that the stage reads, for its loggers.
        """
        uri = stage_uri(storage.join(self.uri, "stages"), name, fingerprint)
        return StageDirectory(
            uri,
            name,
            fingerprint,
            keep_checkpoints=keep_checkpoints,
            keep_best=keep_best,
            require_ownership=lambda: ownership.require_ownership(self.uri, self._owner),
            notice=self.notice,
            logging=replace(self._logging, config=config or {}),
        )

    def close(self) -> None:
        """Releases the workspace, unless another job has taken over."""
        ownership.release(self.uri, self._owner)

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def stage_uri(root: str, name: str, fingerprint: str) -> str:
    return storage.join(root, f"{name}-{fingerprint[:12]}")


def local_directory(uri: str) -> str:
    """The directory itself, or the one on this machine that stands for it where it is in an object store."""
    if storage.is_local(uri):
        return storage.local_path(uri)
    name = hashlib.sha256(uri.encode()).hexdigest()[:16]
    return os.path.join(os.path.expanduser("~/.cache/vrm-pipeline/metrics"), name)


def _read_record(uri: str, *, keys: Sequence[str], remedy: str) -> dict[str, Any]:
    """A JSON object with at least these keys, or a CorruptManifest with its remedy."""
    text = storage.read_text(uri)
    try:
        values = json.loads(text or "")
    except json.JSONDecodeError as error:
        raise CorruptManifest(f"{uri} cannot be read ({error}). {remedy}") from error
    if not isinstance(values, dict):
        raise CorruptManifest(f"{uri} holds {values!r:.60}, not an object. {remedy}")
    missing = [key for key in keys if key not in values]
    if missing:
        raise CorruptManifest(f"{uri} lacks {', '.join(missing)}. {remedy}")
    return values
