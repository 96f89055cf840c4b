"""Runs stages in order: skips what is finished, resumes what is not, commits what it computes."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from pipeline.errors import WorkerDied
from pipeline.records import Metrics, StageResult
from pipeline.stages.fingerprint import fingerprint
from pipeline.stages.metrics_log import as_clock
from pipeline.stages.workspace import StageDirectory, Workspace

PACKAGES = ("torch", "ray", "transformers", "deepspeed", "safetensors", "pyarrow")


class StageRunner:
    """One per job. The data dependency between `run` calls is the order of the stages."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    def run(
        self,
        name: str,
        version: int,
        compute: Callable[[StageDirectory], Metrics],
        *,
        config: Mapping[str, Any],
        inputs: Sequence[StageResult] = (),
        data: Sequence[str] = (),
        keep_checkpoints: int = 2,
        max_restarts: int = 0,
    ) -> StageResult:
        """The stage's result: from the workspace if it is there, else computed from its last committed step.

        Args:
            name, version: identity of the stage's code.
            compute: fills `stage.result_uri`, returns the metrics to keep. Called again after a worker's death.
            config: JSON-able slice of the recipe that `compute` reads.
            inputs: results of earlier stages that `compute` reads.
            data: content fingerprints of files that `compute` reads.
            max_restarts: how often a death of a worker is answered by starting again from the last commit.
        """
        identity = fingerprint(name, version, config, [result.fingerprint for result in inputs] + list(data))
        stage = self.workspace.stage(name, identity, keep_checkpoints=keep_checkpoints)
        finished = stage.result()
        if finished is not None:
            print(f"{name:<19} finished before, skipped", flush=True)
            return finished
        checkpoint = stage.checkpoints.latest()
        begin = "starts" if checkpoint is None else f"resumes behind step {checkpoint.step + 1}"
        print(f"{name:<19} {begin}", flush=True)
        started = time.monotonic()
        metrics = self._compute(name, compute, stage, max_restarts)
        seconds = time.monotonic() - started
        print(f"{name:<19} finished in {as_clock(seconds)}", flush=True)
        return stage.finish(metrics, {"seconds": seconds, "config": dict(config), **environment()})

    def _compute(
        self, name: str, compute: Callable[[StageDirectory], Metrics], stage: StageDirectory, max_restarts: int
    ) -> Metrics:
        for restarts_left in range(max_restarts, -1, -1):
            try:
                return compute(stage)
            except WorkerDied as error:
                if restarts_left == 0:
                    raise
                print(f"{name:<19} {error}\n{name:<19} starts again from its last commit", flush=True)
        raise AssertionError("unreachable")


def environment() -> dict[str, Any]:
    """What a manifest records of the machine: versions, and the driver's own peak memory."""
    return {
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "driver_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
