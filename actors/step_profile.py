"""Records steps of an alignment: the ports of its loop, with a record around every call.

The loop does not know of it. A step begins when the policy before it is loaded, and ends when its own policy is.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from actors.ray_errors import ACTOR_DIED
from pipeline.columns import Rollouts
from pipeline.errors import PipelineError
from pipeline.loops.align_policy import AlignmentPorts
from pipeline.ports import BackgroundRolloutSource, PolicyLearner, Snapshot
from pipeline.records import (
    ExperienceSummary,
    Metrics,
    PolicyWeights,
    Prompt,
    ResponseEvaluations,
    RewardedRows,
    SamplingParams,
)
from pipeline.rewards.rows import RewardRows, RewardSource, SourceScore
from pipeline.stages import storage

TRACE_S = 300.0
"""Seconds that a process may take to write its record."""

PROFILE_DIRECTORY = "profile"


class StepProfile:
    """Starts and ends the records of a step, and keeps when each phase ran in the driver."""

    def __init__(self, steps: Sequence[int], uri: str, name: str, processes: dict[str, Any]) -> None:
        """
        Args:
            steps: the steps to record.
            uri: the directory of the stage.
            name: of the stage, in messages.
            processes: file name -> Ray handle of an actor with `start_profile` and `stop_profile`.
        """
        self._steps = set(steps)
        self._uri = storage.join(uri, PROFILE_DIRECTORY)
        self._name = name
        self._processes = processes
        self._step: int | None = None
        self._events: list[dict[str, Any]] = []

    def follow(self, step: int) -> None:
        """`step` begins now: ends the record of the step before, and begins one if the recipe asks for it."""
        if self._step is not None:
            self._end(self._step)
        self._step = step if step in self._steps else None
        if self._step is not None:
            self._events = []
            for process in self._processes.values():
                process.start_profile.remote()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Names what the driver does, or waits for, in the block."""
        started_us = time.time() * 1e6
        yield
        if self._step is not None:
            duration_us = time.time() * 1e6 - started_us
            event = {"name": name, "ph": "X", "pid": "driver", "tid": "loop", "ts": started_us, "dur": duration_us}
            self._events.append(event)

    def _end(self, step: int) -> None:
        place = storage.join(self._uri, f"step-{step:06}")
        told = place
        try:
            with storage.writing(place) as directory, open(os.path.join(directory, "driver.json"), "w") as file:
                json.dump({"traceEvents": self._events}, file)
            with storage.writing(self._uri) as directory:
                ray.timeline(os.path.join(directory, "ray_timeline.json"))
            ray.get([p.stop_profile.remote(place, file) for file, p in self._processes.items()], timeout=TRACE_S)
        # A record is no reason to end a run.
        except (*ACTOR_DIED, RayError, OSError, PipelineError) as error:
            told = f"{place}, not complete ({type(error).__name__}: {error})"
        print(f"{self._name:<19} profile of step {step}: {told}", flush=True)


def profiled(ports: AlignmentPorts, profile: StepProfile) -> AlignmentPorts:
    """The same ports, recorded."""
    return AlignmentPorts(
        rollouts=ProfiledRollouts(ports.rollouts, profile),
        sources=tuple(replace(source, source=ProfiledSource(source.source, profile)) for source in ports.sources),
        learner=ProfiledLearner(ports.learner, profile),
    )


class ProfiledRollouts:
    """Implements `BackgroundRolloutSource`."""

    def __init__(self, rollouts: BackgroundRolloutSource, profile: StepProfile) -> None:
        self._rollouts = rollouts
        self._profile = profile

    def load_weights(self, weights: PolicyWeights) -> Metrics:
        with self._profile.phase("weights"):
            metrics = self._rollouts.load_weights(weights)
        # The policy of version v samples step v.
        self._profile.follow(weights.version)
        return metrics

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Rollouts:
        with self._profile.phase("rollout"):
            return self._rollouts.generate(prompts, sampling)

    def sleep(self) -> None:
        self._rollouts.sleep()

    def begin(self, prompts: Sequence[Prompt], sampling: SamplingParams, *, resample_unfinished: bool) -> None:
        self._rollouts.begin(prompts, sampling, resample_unfinished=resample_unfinished)

    def collect(self) -> Rollouts:
        with self._profile.phase("rollout"):
            return self._rollouts.collect()


class ProfiledSource:
    """Implements `RewardSource`."""

    def __init__(self, source: RewardSource, profile: StepProfile) -> None:
        self._source = source
        self._profile = profile

    def score(self, rows: RewardRows) -> list[SourceScore]:
        with self._profile.phase("score"):
            return self._source.score(rows)


class ProfiledLearner:
    """Implements `PolicyLearner`."""

    def __init__(self, learner: PolicyLearner[Any, Any], profile: StepProfile) -> None:
        self._learner = learner
        self._profile = profile

    def restore(self, checkpoint: str) -> None:
        self._learner.restore(checkpoint)

    def evaluate(self, rollouts: Rollouts) -> tuple[Any, ResponseEvaluations]:
        with self._profile.phase("evaluate"):
            return self._learner.evaluate(rollouts)

    def build_experience(
        self, evaluated: Any, rewarded: RewardedRows, *, kl_coefficient: float
    ) -> tuple[Any, ExperienceSummary]:
        return self._learner.build_experience(evaluated, rewarded, kl_coefficient=kl_coefficient)

    def update(self, experience: Any, step: int) -> Metrics:
        with self._profile.phase("update"):
            return self._learner.update(experience, step)

    def publish_weights(self, version: int) -> PolicyWeights:
        with self._profile.phase("weights"):
            return self._learner.publish_weights(version)

    def snapshot(self) -> Snapshot:
        return self._learner.snapshot()

    def export(self, directory: str) -> None:
        self._learner.export(directory)

    def peak_memory(self) -> Metrics:
        return self._learner.peak_memory()
