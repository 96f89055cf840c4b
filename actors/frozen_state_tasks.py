"""The states of frozen backbones over all pairs of a run, computed once by Ray tasks and kept in files.

Heads, seeds, the judge and a resumed run share them: the files are named by the backbone's weights, its precision and
the tokens they are states of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

import ray

from actors.ray_tasks import ProcessResources, as_remote_tasks, outcomes_of_streams
from cluster.resources import Demand
from pipeline.config.recipe import Recipe
from pipeline.data.batching import stable_seed
from pipeline.errors import ConfigError, PipelineError
from pipeline.records import PromptGroup
from pipeline.stages import storage
from pipeline.tracking.progress import Progress, as_number

if TYPE_CHECKING:
    from pipeline.models.frozen_states import StatesSpec

GROUPS_PER_FILE = 16
"""What a killed pass over the pairs loses at most."""


def states_of(recipe: Recipe, states_uri: str) -> str | None:
    """Where the states of the recipe's backbone are kept; None where it trains, or starts from noise."""
    spec = _spec_of(recipe)
    return None if spec is None else storage.join(states_uri, spec.key)


def keep_states(
    recipes: Sequence[Recipe],
    demand: Demand,
    states_uri: str,
    *,
    max_restarts: int,
    name: str,
    console: TextIO | None = None,
) -> None:
    """Fills `states_uri` with what the frozen backbone of these recipes says of their pairs, where it is not there yet.

    The prompts are dealt over the whole cluster; recipes whose backbone trains, or starts from noise, have no states.
    A killed pass goes on where it was.

    Args:
        name: the stage or the job that waits for them, as the progress names it.
        console: where the progress is shown; standard output unless given.

    Raises:
        ConfigError: the states are larger than `cluster.states_gib`.
        PipelineError: the data or the backbone cannot be read, or a process died too often.
    """
    of_each_seed = list({recipe.seed: recipe for recipe in recipes if _spec_of(recipe)}.values())
    specs = [spec for spec in map(_spec_of, of_each_seed) if spec is not None]
    if not specs:
        return
    available = ray.cluster_resources()
    if demand.gpus:
        shards = max(1, int(available.get("GPU", 0) // demand.gpus))
    else:
        shards = max(1, int(available.get("CPU", 0) // demand.cpus))
    remote, resources = as_remote_tasks(demand, max_restarts)
    task = remote(compute_missing_states, num_returns="streaming")
    streams = {task.remote(of_each_seed, resources, states_uri, shard, shards): shard for shard in range(shards)}
    of_one = specs[0].bytes_per_response
    counts: dict[int, tuple[int, int]] = {}
    with contextlib.ExitStack() as exits:
        progress = None
        for shard, outcome in outcomes_of_streams(streams):
            if isinstance(outcome, PipelineError):
                raise outcome
            counts[shard] = outcome
            done, total = (sum(numbers) for numbers in zip(*counts.values(), strict=True))
            # Each shard first tells how much it has to do.
            if progress is None and len(counts) == shards and total:
                progress = exits.enter_context(Progress(name, total, stream=console))
            if progress is not None and done:
                words = f"states of the frozen backbone, {done * of_one / 2**20:.1f} MiB"
                progress.show(done, f"{words}  {as_number(done / progress.seconds)} responses/s")


def compute_missing_states(
    recipes: Sequence[Recipe], resources: ProcessResources, states_uri: str, shard: int, shards: int
) -> Iterator[tuple[int, int]]:
    """One shard of `keep_states`, in this process; `recipes` have one backbone and differ in their data.

    Yields:
        Responses computed so far, and how many there are to compute.
    """
    from pipeline.models.frozen_states import FrozenStates, compute_states, load_frozen_backbone, write_states

    resources.apply()
    recipe = recipes[0]
    spec = _spec_of(recipe)
    if spec is None:
        raise ValueError(f"the backbone of {recipe.name} trains, or starts from noise: it has no states to keep")
    uri = storage.join(states_uri, spec.key)
    known = FrozenStates.read(uri)
    missing = known.missing(group for each in recipes for group in _groups_of(each, spec.backbone))
    _require_room(len(known) + _responses(missing), spec.bytes_per_response, recipe.cluster.states_gib)
    # By a hash of the prompt: the tasks see the same data, whatever order they see it in.
    mine = [group for group in missing if stable_seed("states", *group.prompt_ids) % shards == shard]
    total, done = _responses(mine), 0
    yield 0, total
    if not mine:
        return
    model = load_frozen_backbone(spec, device=resources.device)
    for first in range(0, len(mine), GROUPS_PER_FILE):
        groups = mine[first : first + GROUPS_PER_FILE]
        states = compute_states(model, groups, spec)
        with storage.writing(uri) as written:
            write_states(states, written)
        done += _responses(groups)
        yield done, total


def _spec_of(recipe: Recipe) -> StatesSpec | None:
    """None where the backbone trains, or starts from noise."""
    from pipeline.models.frozen_states import StatesSpec

    config, backbone = recipe.reward, recipe.reward.backbone or recipe.policy.checkpoint
    if config.trainable_layers != 0 or backbone is None:
        return None
    return StatesSpec(
        backbone=backbone, dtype=config.backbone_dtype, layers=config.backbone_layers, pooling=config.pooling
    )


def _groups_of(recipe: Recipe, backbone: str) -> list[PromptGroup]:
    """Pairs that another seed splits elsewhere, or whose label another run flips, are the same texts."""
    from pipeline.data.run_data import load_data, pairs_of_the_judge, pairs_of_the_reward_model
    from pipeline.loops.reward import RewardTraining, as_judge

    data = load_data(recipe)
    runs = [RewardTraining.prepare(recipe, pairs_of_the_reward_model(data, recipe.judge), backbone)]
    if recipe.judge is not None:
        runs.append(RewardTraining.prepare(as_judge(recipe), pairs_of_the_judge(data, recipe.judge), backbone))
    return [
        pair.tokens
        for run in runs
        for pair in (*run.data.pairs, *run.data.heldout_pairs, *run.data.mismatched_heldout_pairs)
    ]


def _responses(groups: Sequence[PromptGroup]) -> int:
    return sum(len(group.response_ids) for group in groups)


def _require_room(num_responses: int, bytes_per_response: int, limit_gib: float) -> None:
    needed = num_responses * bytes_per_response / 2**30
    if needed > limit_gib:
        raise ConfigError(
            f"the states of {num_responses:,} responses take {needed:.2f} GiB, more than cluster.states_gib = "
            f"{limit_gib:g}. Raise it, or lower data.max_pairs."
        )
