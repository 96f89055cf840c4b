"""Cells of a comparison of methods as Ray tasks, each in one process, on policies and reward models that they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import ray

from actors.alignment_tasks import prepare_policy, train_shared_reward_model
from actors.experiment_tasks import ProcessResources, RunOutcome, as_remote_tasks, outcomes_as_they_end
from actors.frozen_state_tasks import keep_states
from cluster.resources import Demand
from pipeline.config.recipe import Recipe
from pipeline.errors import PipelineError
from pipeline.experiments.grid import Run
from pipeline.records import Metrics, StageResult
from pipeline.stages import storage

if TYPE_CHECKING:
    from pipeline.experiments.method_run import CellInputs


def compare_everywhere(
    cells: Sequence[Run], demand: Demand, out: str, *, max_restarts: int
) -> Iterator[tuple[int, RunOutcome]]:
    """Computes the cells, as many at a time as there is room for.

    The states of frozen backbones come first, then fine-tuned policies and reward models, one for all cells that agree
    on it. All are kept in `out`. An error in one of the models ends the cells that need it.

    Args, Yields:
        As `actors.alignment_tasks.align_everywhere`.
    """
    from pipeline.experiments.methods import judge_of
    from pipeline.loops.reward import reward_stage
    from pipeline.loops.sft import sft_stage

    shared, states = storage.join(out, "shared"), storage.join(out, "states")
    judged_by = [judge_of(cell.recipe) for cell in cells]
    keep_states(judged_by, demand, states, max_restarts=max_restarts, name="compare_methods")
    remote, resources = as_remote_tasks(demand, max_restarts)
    policies: dict[str, ray.ObjectRef] = {}
    reward_models: dict[str, ray.ObjectRef] = {}
    tasks = {}
    for i, cell in enumerate(cells):
        policy = sft_stage(cell.recipe).fingerprint
        if policy not in policies:
            policies[policy] = remote(prepare_policy).remote(cell.recipe, shared, resources)
        for recipe in (judge := judge_of(cell.recipe), own := reward_recipe(cell.recipe)):
            fingerprint = reward_stage(recipe, policy).fingerprint
            if fingerprint not in reward_models:
                task = remote(train_shared_reward_model)
                reward_models[fingerprint] = task.remote(recipe, policies[policy], shared, resources, states)
        given = [reward_models[reward_stage(recipe, policy).fingerprint] for recipe in (judge, own)]
        directory = storage.join(out, f"cells/{cell.config_hash}")
        task = remote(compute_cell).remote(cell.recipe, policies[policy], *given, shared, directory, resources)
        tasks[task] = i
    yield from outcomes_as_they_end(tasks)


def reward_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the reward model that a cell is aligned against: the judge's, where it reads pairs alone."""
    from pipeline.experiments.methods import judge_of, needs_reward_model

    return recipe if needs_reward_model(recipe) else judge_of(recipe)


def compute_cell(
    recipe: Recipe,
    policy: StageResult,
    judge: StageResult,
    reward_model: StageResult,
    shared: str,
    directory: str,
    resources: ProcessResources,
) -> dict[str, Any]:
    """Plain data of the `RunResult` of one cell, computed in this process.

    Args:
        policy, judge, reward_model: as in `CellInputs`.
        shared, directory: as in `align_by_method`.
    """
    from pipeline.data.run_data import load_data
    from pipeline.experiments.method_run import CellInputs, align_by_method
    from pipeline.experiments.methods import needs_reward_model
    from pipeline.experiments.shared_stages import seconds_of

    resources.apply()
    inputs = CellInputs(
        policy=policy,
        judge=judge,
        reward_model=reward_model,
        reward_model_seconds=seconds_of(reward_model) if needs_reward_model(recipe) else 0.0,
    )
    result = align_by_method(
        recipe, load_data(recipe), inputs, shared=shared, directory=directory, device=resources.device
    )
    return asdict(result)


def measure_everywhere(recipe: Recipe, inputs: CellInputs, aligned: StageResult, directory: str) -> Metrics:
    """`measure_policy` as a Ray task that holds what one scoring replica of the recipe holds."""
    replica = recipe.cluster.scoring
    demand = Demand(
        role="measurement",
        setting="cluster.scoring",
        count=1,
        cpus=replica.cpus_per_replica,
        gpus=min(1.0, replica.gpus_per_replica),
    )
    remote, resources = as_remote_tasks(demand, recipe.cluster.alignment.max_restarts)
    tasks = {remote(measure_cell).remote(recipe, inputs, aligned, directory, resources): 0}
    ((_, outcome),) = outcomes_as_they_end(tasks)
    if isinstance(outcome, PipelineError):
        raise outcome
    return outcome


def measure_cell(
    recipe: Recipe, inputs: CellInputs, aligned: StageResult, directory: str, resources: ProcessResources
) -> Metrics:
    """`measure_policy` in this process."""
    from pipeline.data.run_data import load_data
    from pipeline.experiments.local_run import LocalRun
    from pipeline.experiments.method_run import measure_policy

    resources.apply()
    run = LocalRun.open(recipe, load_data(recipe), inputs.policy, directory=directory, device=resources.device)
    return measure_policy(run, inputs, aligned, recipe.comparison)
