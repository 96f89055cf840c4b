"""Reward models of an experiment as Ray tasks, each a whole training in one process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from actors.frozen_state_tasks import states_of
from actors.ray_tasks import ProcessResources, RunOutcome, as_remote_tasks, outcomes_as_they_end
from cluster.resources import Demand
from pipeline.config.recipe import Recipe
from pipeline.stages import storage

if TYPE_CHECKING:
    from pipeline.loops.reward import RewardTraining


def train_everywhere(
    recipes: Sequence[Recipe], demand: Demand, states_uri: str, *, max_restarts: int
) -> Iterator[tuple[int, RunOutcome]]:
    """Trains the reward model of every recipe, as many at a time as the cluster has room for.

    Args:
        recipes: one a run.
        demand: what one run holds.
        states_uri: what `keep_states` filled.
        max_restarts: how often a run is begun anew after its process died.

    Yields:
        (index of the recipe, outcome), as runs finish. An error ends its own run only.
    """
    remote, resources = as_remote_tasks(demand, max_restarts)
    task = remote(train_one)
    yield from outcomes_as_they_end({task.remote(recipe, resources, states_uri): i for i, recipe in enumerate(recipes)})


def train_one(recipe: Recipe, resources: ProcessResources, states_uri: str | None = None) -> dict[str, Any]:
    """Plain data of the `RunResult` of one recipe, whose reward model is trained in this process.

    Args:
        states_uri: what `keep_states` filled; None computes every state as it is needed.
    """
    from pipeline.experiments.reward_run import train_and_measure
    from pipeline.learning.builders import build_reward_trainer, engine_in_process

    resources.apply()
    with tempfile.TemporaryDirectory() as directory:
        training = _prepare_training(recipe, directory)
        if states_uri is not None:
            training = replace(training, spec=replace(training.spec, states_uri=states_of(recipe, states_uri)))
        trainer = build_reward_trainer(training.spec, engine_in_process(resources.device))
        return asdict(train_and_measure(training, trainer, storage.join(directory, "training")))


def _prepare_training(recipe: Recipe, directory: str) -> RewardTraining:
    """A backbone from noise is written into `directory`."""
    from pipeline.data.run_data import load_data, pairs_of_the_reward_model
    from pipeline.learning.starting_policy import write_starting_policy
    from pipeline.loops.reward import RewardTraining

    backbone = recipe.reward.backbone or recipe.policy.checkpoint
    if backbone is None:
        backbone = storage.join(directory, "policy")
        write_starting_policy(recipe.policy, backbone, seed=recipe.seed)
    data = pairs_of_the_reward_model(load_data(recipe), recipe.judge)
    return RewardTraining.prepare(recipe, data, backbone)
