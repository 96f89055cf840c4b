"""Reward models of an experiment as Ray tasks, each a whole training in one process."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayTaskError, WorkerCrashedError

from actors.ray_errors import ACTOR_DIED
from cluster.resources import Demand
from pipeline.config.recipe import Recipe
from pipeline.data.recipe_files import DATA_ROOT
from pipeline.errors import PipelineError, WorkerDied
from pipeline.records import PromptGroup
from pipeline.stages import storage
from pipeline.stages.fingerprint import directory_fingerprint, fingerprint
from pipeline.stages.metrics_log import as_clock

if TYPE_CHECKING:
    from pipeline.learning.reward_trainer import RewardTrainer
    from pipeline.loops.reward import RewardTraining
    from pipeline.models.frozen_states import FrozenStates
    from pipeline.models.reward_model import RewardModel

WAIT_S = 60.0
"""Longest single wait for Ray. How long a training takes nobody can say beforehand, so the wait is repeated."""

REPORT_PERIOD_S = 10.0

PAIRS_PER_FILE = 32
"""What a killed pass over the pairs loses at most."""

STATES_VERSION = 1
"""Raised when states are computed otherwise."""

RunOutcome = dict[str, Any] | PipelineError
"""Plain data that a task returned, or the error that ended it."""


@dataclass(frozen=True, kw_only=True)
class ProcessResources:
    """What the process of a run may use."""

    cpus: float
    gpus: float
    data_root: str
    """Where relative data paths start; a Ray task does not inherit the environment of the job."""

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    def apply(self) -> None:
        """Makes this process keep to it."""
        import torch

        from pipeline.learning.memory import keep_freed_memory

        os.environ[DATA_ROOT] = self.data_root
        torch.set_num_threads(max(1, int(self.cpus)))
        keep_freed_memory(torch.device(self.device))


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


def keep_states(
    recipes: Sequence[Recipe],
    demand: Demand,
    states_uri: str,
    *,
    max_restarts: int,
    report: Callable[[str], None],
) -> None:
    """Fills `states_uri` with what the frozen backbone of these recipes says of their pairs, where it is not there yet.

    The pairs are dealt over the whole cluster; recipes whose backbone trains, or starts from noise, have no states.
    A killed pass goes on where it was.

    Raises:
        PipelineError: the data or the backbone cannot be read, or a process died too often.
    """
    frozen = [recipe for recipe in recipes if backbone_key(recipe) is not None]
    of_each_seed = list({recipe.seed: recipe for recipe in frozen}.values())
    if not of_each_seed:
        return
    available = ray.cluster_resources()
    if demand.gpus:
        shards = max(1, int(available.get("GPU", 0) // demand.gpus))
    else:
        shards = max(1, int(available.get("CPU", 0) // demand.cpus))
    remote, resources = as_remote_tasks(demand, max_restarts)
    task = remote(compute_missing_states, num_returns="streaming")
    streams = {task.remote(of_each_seed, resources, states_uri, shard, shards): shard for shard in range(shards)}
    progress: dict[int, tuple[int, int]] = {}
    started = last_report = time.monotonic()
    for shard, outcome in outcomes_of_streams(streams):
        if isinstance(outcome, PipelineError):
            raise outcome
        progress[shard] = outcome
        done, total = (sum(counts) for counts in zip(*progress.values(), strict=True))
        now = time.monotonic()
        if done and (now - last_report >= REPORT_PERIOD_S or done == total):
            last_report, left = now, as_clock((now - started) * (total - done) / done)
            report(f"states of the frozen backbone  {done:,}/{total:,} pairs  {left} left")


def as_remote_tasks(demand: Demand, max_restarts: int) -> tuple[Callable[..., Any], ProcessResources]:
    """What makes a function a Ray task that holds the demand, and what the task's process may then use."""
    options = {"num_cpus": demand.cpus, "num_gpus": demand.gpus, "max_retries": max_restarts}
    resources = ProcessResources(cpus=demand.cpus, gpus=demand.gpus, data_root=os.environ.get(DATA_ROOT, ""))
    return lambda function, **others: ray.remote(function).options(**options, **others), resources


def outcomes_as_they_end(tasks: dict[ray.ObjectRef, int]) -> Iterator[tuple[int, RunOutcome]]:
    """(index of a task, its outcome), the task that ends first is the first. Tasks that are not read are cancelled."""
    try:
        while tasks:
            done, _ = ray.wait(list(tasks), num_returns=1, timeout=WAIT_S)
            for task in done:
                yield tasks.pop(task), _outcome(task)
    finally:
        for task in tasks:
            ray.cancel(task, force=True)


def outcomes_of_streams(streams: dict[ray.ObjectRefGenerator, int]) -> Iterator[tuple[int, Any]]:
    """(index of a task, what it yielded or the error that ended it), of tasks that yield on their way."""
    try:
        while streams:
            ready, _ = ray.wait(list(streams), num_returns=1, timeout=WAIT_S)
            stream: Any  # ray.wait is annotated for references alone
            for stream in ready:
                if (reference := next(stream, None)) is None:
                    del streams[stream]
                else:
                    yield streams[stream], _outcome(reference)
    finally:
        for stream in streams:
            ray.cancel(stream, force=True)


def _outcome(finished: ray.ObjectRef) -> RunOutcome:
    try:
        return ray.get(finished, timeout=WAIT_S)
    except RayTaskError as error:
        if isinstance(error.cause, PipelineError):
            return error.cause
        raise
    except (*ACTOR_DIED, WorkerCrashedError) as error:
        return WorkerDied(f"its process died, most often for want of memory: {error}. The same command runs it again.")


def backbone_key(recipe: Recipe) -> str | None:
    """Identity of the states of a recipe's backbone; None where it trains, or starts from noise."""
    config = recipe.reward
    uri = config.backbone or recipe.policy.checkpoint
    if config.trainable_layers != 0 or uri is None:
        return None
    inputs = [directory_fingerprint(uri) if os.path.isdir(uri) else uri]
    return fingerprint("frozen_states", STATES_VERSION, {"dtype": config.backbone_dtype}, inputs)[:16]


def train_one(recipe: Recipe, resources: ProcessResources, states_uri: str | None = None) -> dict[str, Any]:
    """Plain data of the `RunResult` of one recipe, whose reward model is trained in this process.

    Args:
        states_uri: what `keep_states` filled; None computes every state as it is needed.
    """
    from pipeline.experiments.reward_run import train_and_measure

    resources.apply()
    with tempfile.TemporaryDirectory() as directory:
        training = _prepare_training(recipe, directory)
        trainer = _trainer_in_process(training, resources.device)
        key = backbone_key(recipe)
        if states_uri is not None and key is not None:
            _reward_model_of(trainer).frozen_states = _states_in(storage.join(states_uri, key))
        return asdict(train_and_measure(training, trainer, storage.join(directory, "training")))


def compute_missing_states(
    recipes: Sequence[Recipe], resources: ProcessResources, states_uri: str, shard: int, shards: int
) -> Iterator[tuple[int, int]]:
    """One shard of `keep_states`, in this process; `recipes` have one backbone and differ in their data.

    Yields:
        Pairs computed so far, and how many there are to compute.
    """
    from pipeline.models.frozen_states import write_states
    from pipeline.models.reward_model import compute_states

    resources.apply()
    uri = storage.join(states_uri, str(backbone_key(recipes[0])))
    known = _states_in(uri)
    missing: dict[frozenset[str], PromptGroup] = {}
    with tempfile.TemporaryDirectory() as directory:
        for recipe in recipes:
            training = _prepare_training(recipe, directory)
            # Pairs that another seed splits elsewhere, or whose label another run flips, are the same texts.
            missing |= {frozenset(keys): tokens for keys, tokens in _pairs_of(training) if not known.holds(keys)}
    mine = [tokens for keys, tokens in missing.items() if int(min(keys), 16) % shards == shard]
    yield 0, len(mine)
    if mine:
        model = _reward_model_of(_trainer_in_process(training, resources.device))
    for first in range(0, len(mine), PAIRS_PER_FILE):
        states = compute_states(model, mine[first : first + PAIRS_PER_FILE], dtype=training.spec.config.backbone_dtype)
        with storage.writing(uri) as written:
            write_states(states, written)
        yield min(first + PAIRS_PER_FILE, len(mine)), len(mine)


def _prepare_training(recipe: Recipe, directory: str) -> RewardTraining:
    """A backbone from noise is written into `directory`."""
    from pipeline.data.run_data import load_data
    from pipeline.learning.starting_policy import write_starting_policy
    from pipeline.loops.reward import RewardTraining

    backbone = recipe.reward.backbone or recipe.policy.checkpoint
    if backbone is None:
        backbone = storage.join(directory, "policy")
        write_starting_policy(recipe.policy, backbone, seed=recipe.seed)
    return RewardTraining.prepare(recipe, load_data(recipe), backbone)


def _trainer_in_process(training: RewardTraining, device: str) -> RewardTrainer:
    from pipeline.learning.builders import build_reward_trainer, engine_in_process

    return build_reward_trainer(training.spec, engine_in_process(device))


def _reward_model_of(trainer: RewardTrainer) -> RewardModel:
    from pipeline.models.reward_model import RewardModel

    model = trainer.engine.module
    assert isinstance(model, RewardModel), "a reward trainer trains a reward model"
    return model


def _pairs_of(training: RewardTraining) -> Iterator[tuple[list[str], PromptGroup]]:
    from pipeline.models.frozen_states import response_keys
    from pipeline.models.packing import pack

    for pair in (*training.data.pairs, *training.data.heldout_pairs):
        yield response_keys(pack([pair.tokens])), pair.tokens


def _states_in(uri: str) -> FrozenStates:
    from pipeline.models.frozen_states import FrozenStates

    with storage.reading(uri) as directory:
        return FrozenStates.read(directory)
