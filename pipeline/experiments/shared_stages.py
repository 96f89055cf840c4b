"""Stages whose result several runs of an experiment share, computed in one process by the first run that needs them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext

from pipeline.config.recipe import ExperimentConfig
from pipeline.data.run_data import load_data, pairs_of_the_reward_model
from pipeline.learning.builders import build_reward_trainer, build_sft_trainer, engine_in_process
from pipeline.loops.reward import reward_stage, run_reward_training
from pipeline.loops.sft import run_sft, sft_stage
from pipeline.records import Metrics, StageResult
from pipeline.stages import storage
from pipeline.stages.stage_spec import StageSpec
from pipeline.stages.workspace import StageDirectory

SECONDS = "seconds"
"""How long a shared stage took, in its manifest."""


def shared_policy(experiment: ExperimentConfig, root: str, *, device: str) -> StageResult:
    """The policy before alignment, from `root`, or trained in this process and committed there."""
    return from_root_or_computed(
        sft_stage(experiment),
        root,
        lambda stage: run_sft(
            stage,
            experiment,
            lambda: load_data(experiment),
            lambda spec: nullcontext(build_sft_trainer(spec, engine_in_process(device))),
        ),
    )


def shared_reward_model(
    experiment: ExperimentConfig, policy: StageResult, root: str, *, device: str, states_uri: str | None = None
) -> StageResult:
    """The reward model on top of the policy, from `root`, or trained in this process and committed there.

    Args:
        states_uri: where the states of a frozen backbone are kept; None computes them as they are needed.
    """
    return from_root_or_computed(
        reward_stage(experiment, policy.fingerprint),
        root,
        lambda stage: run_reward_training(
            stage,
            experiment,
            pairs_of_the_reward_model(load_data(experiment), experiment.judge),
            policy.location,
            lambda spec: nullcontext(build_reward_trainer(spec, engine_in_process(device))),
            states_uri=states_uri,
        ),
    )


def from_root_or_computed(spec: StageSpec, root: str, compute: Callable[[StageDirectory], Metrics]) -> StageResult:
    """No two processes may compute the same stage at a time."""
    stage = StageDirectory.shared(root, spec)
    finished = stage.result()
    if finished is not None:
        return finished
    stage.delete_uncommitted()
    started = time.monotonic()
    metrics = compute(stage)
    return stage.finish(metrics, {SECONDS: time.monotonic() - started})


def seconds_of(result: StageResult) -> float:
    """How long the finished stage took."""
    return float(StageDirectory(storage.parent(result.location), result.name, result.fingerprint).manifest()[SECONDS])
