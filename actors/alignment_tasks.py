"""Alignments of an experiment as Ray tasks, each in one process, on policies and reward models that they share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import ray

from actors.frozen_state_tasks import states_of
from actors.ray_tasks import ProcessResources, RunOutcome, as_remote_tasks, outcomes_as_they_end
from cluster.resources import Demand
from pipeline.config.recipe import Recipe
from pipeline.records import StageResult


def align_everywhere(
    recipes: Sequence[Recipe], demand: Demand, shared: str, *, max_restarts: int
) -> Iterator[tuple[int, RunOutcome]]:
    """Aligns the policy of every recipe against its own reward model, as many at a time as there is room for.

    The policies to start from and the reward models are trained first, one for all recipes that agree on it, and
    committed in `shared`; an error in one of them ends the runs that need it.

    Args, Yields:
        As `actors.experiment_tasks.train_everywhere`.
    """
    from pipeline.loops.reward import reward_stage
    from pipeline.loops.sft import sft_stage

    remote, resources = as_remote_tasks(demand, max_restarts)
    policies: dict[str, ray.ObjectRef] = {}
    reward_models: dict[str, ray.ObjectRef] = {}
    alignments = {}
    for i, recipe in enumerate(recipes):
        policy = sft_stage(recipe).fingerprint
        reward_model = reward_stage(recipe, policy).fingerprint
        if policy not in policies:
            policies[policy] = remote(prepare_policy).remote(recipe, shared, resources)
        if reward_model not in reward_models:
            task = remote(train_shared_reward_model)
            reward_models[reward_model] = task.remote(recipe, policies[policy], shared, resources)
        alignment = remote(align_one).remote(recipe, policies[policy], reward_models[reward_model], resources)
        alignments[alignment] = i
    yield from outcomes_as_they_end(alignments)


def prepare_policy(recipe: Recipe, shared: str, resources: ProcessResources) -> StageResult:
    """The policy before alignment, fine-tuned in this process, or as it lies in `shared`."""
    from pipeline.experiments.shared_stages import shared_policy

    resources.apply()
    return shared_policy(recipe, shared, device=resources.device)


def train_shared_reward_model(
    recipe: Recipe, policy: StageResult, shared: str, resources: ProcessResources, states_uri: str | None = None
) -> StageResult:
    """The reward model on the backbone of `policy`, trained in this process, or as it lies in `shared`.

    Args:
        states_uri: what `keep_states` filled; None computes every state as it is needed.
    """
    from pipeline.experiments.shared_stages import shared_reward_model

    resources.apply()
    states = None if states_uri is None else states_of(recipe, states_uri)
    return shared_reward_model(recipe, policy, shared, device=resources.device, states_uri=states)


def align_one(
    recipe: Recipe, policy: StageResult, reward_model: StageResult, resources: ProcessResources
) -> dict[str, Any]:
    """Plain data of the `RunResult` of one recipe, aligned in this process.

    Args:
        policy, reward_model: what the alignment starts from, and what it is aligned against.
    """
    from pipeline.data.run_data import load_data
    from pipeline.experiments.policy_run import align_and_measure

    resources.apply()
    with tempfile.TemporaryDirectory() as directory:
        result = align_and_measure(
            recipe, load_data(recipe), policy, reward_model, directory=directory, device=resources.device
        )
    return asdict(result)
