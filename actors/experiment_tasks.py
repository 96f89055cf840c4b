"""Reward models of an experiment as Ray tasks, each a whole training in one process."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayTaskError, WorkerCrashedError

from actors.ray_errors import ACTOR_DIED as DIED
from actors.reward_trainer import RewardTrainerSpec, reward_trainer
from cluster.resources import Demand
from pipeline.config.recipe import Recipe
from pipeline.data.files import content_fingerprint
from pipeline.errors import PipelineError, WorkerDied
from pipeline.records import PromptGroup
from pipeline.stages import storage
from pipeline.stages.fingerprint import fingerprint
from pipeline.stages.metrics_log import as_clock

if TYPE_CHECKING:
    from pipeline.data.run_data import RunData
    from pipeline.learning.reward_data import RewardData
    from pipeline.learning.reward_trainer import RewardTrainer
    from pipeline.models.frozen_states import FrozenStates

LOOK_AGAIN_S = 60.0
TELL_AGAIN_S = 10.0

PAIRS_PER_FILE = 32
"""What a killed pass over the pairs loses at most."""

STATES_VERSION = 1
"""Raised when states are computed otherwise."""

Outcome = dict[str, Any] | PipelineError
"""Plain data that a task returned, or the error that ended it."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """What the process of a run has."""

    cpus: float
    gpus: float
    data_root: str

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    def take(self) -> None:
        """Makes this process keep to it."""
        import torch

        from pipeline.data.run_data import DATA_ROOT
        from pipeline.learning.memory import keep_freed_memory

        os.environ[DATA_ROOT] = self.data_root
        torch.set_num_threads(max(1, int(self.cpus)))
        keep_freed_memory(torch.device(self.device))


def train_everywhere(
    recipes: Sequence[Recipe], demand: Demand, states_uri: str, *, max_restarts: int
) -> Iterator[tuple[int, Outcome]]:
    """Trains the reward model of every recipe, as many at a time as the cluster has room for.

    Args:
        recipes: one a run.
        demand: what one run holds.
        states_uri: what `keep_states` filled.
        max_restarts: how often a run is begun anew after its process died.

    Yields:
        (index of the recipe, outcome), as runs finish. An error ends its own run only.
    """
    remote, place = remote_at(demand, max_restarts)
    task = remote(train_one)
    yield from as_they_finish({task.remote(recipe, place, states_uri): i for i, recipe in enumerate(recipes)})


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
    room = ray.cluster_resources()
    shards = max(1, int(room.get("GPU", 0) // demand.gpus if demand.gpus else room.get("CPU", 0) // demand.cpus))
    remote, place = remote_at(demand, max_restarts)
    task = remote(compute_missing_states, num_returns="streaming")
    streams = {task.remote(of_each_seed, place, states_uri, i, shards): i for i in range(shards)}
    progress: dict[int, tuple[int, int]] = {}
    started = told = time.monotonic()
    for shard, outcome in as_they_come(streams):
        if isinstance(outcome, PipelineError):
            raise outcome
        progress[shard] = outcome
        done, of = (sum(counts) for counts in zip(*progress.values(), strict=True))
        now = time.monotonic()
        if done and (now - told >= TELL_AGAIN_S or done == of):
            told, left = now, as_clock((now - started) * (of - done) / done)
            report(f"states of the frozen backbone  {done:,}/{of:,} pairs  {left} left")


def remote_at(demand: Demand, max_restarts: int) -> tuple[Callable[..., Any], Place]:
    options = {"num_cpus": demand.cpus, "num_gpus": demand.gpus, "max_retries": max_restarts}
    place = Place(cpus=demand.cpus, gpus=demand.gpus, data_root=os.environ.get("VRM_DATA_ROOT", ""))
    return lambda function, **others: ray.remote(function).options(**options, **others), place


def as_they_finish(waiting: dict[ray.ObjectRef, int]) -> Iterator[tuple[int, Outcome]]:
    try:
        while waiting:
            # How long a training may take nobody can say beforehand; the job prints every run that ends.
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=LOOK_AGAIN_S)
            for reference in done:
                yield waiting.pop(reference), _outcome(reference)
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


def as_they_come(streams: dict[ray.ObjectRefGenerator, int]) -> Iterator[tuple[int, Any]]:
    """(index, what the task yielded or the error that ended it), of tasks that yield as they go."""
    try:
        while streams:
            ready, _ = ray.wait(list(streams), num_returns=1, timeout=LOOK_AGAIN_S)
            for stream in ready:
                if (reference := next(stream, None)) is None:
                    del streams[stream]
                else:
                    yield streams[stream], _outcome(reference)
    finally:
        for stream in streams:
            ray.cancel(stream, force=True)


def _outcome(finished: ray.ObjectRef) -> Outcome:
    try:
        return ray.get(finished, timeout=LOOK_AGAIN_S)
    except RayTaskError as error:
        if isinstance(error.cause, PipelineError):
            return error.cause
        raise
    except (*DIED, WorkerCrashedError) as error:
        return WorkerDied(f"its process died, most often for want of memory: {error}. The same command runs it again.")


def backbone_key(recipe: Recipe) -> str | None:
    """Identity of the states of a recipe's backbone; None where it trains, or starts from noise."""
    config = recipe.reward
    uri = config.backbone or recipe.policy.checkpoint
    if config.trainable_layers != 0 or uri is None:
        return None
    inputs = [content_fingerprint(uri) if os.path.isdir(uri) else uri]
    return fingerprint("frozen_states", STATES_VERSION, {"dtype": config.backbone_dtype}, inputs)[:16]


def train_one(recipe: Recipe, place: Place, states_uri: str | None = None) -> dict[str, Any]:
    """Plain data of the `RunResult` of one recipe, whose reward model is trained in this process.

    Args:
        states_uri: what `keep_states` filled; None computes every state as it is needed.
    """
    from pipeline.experiments.reward_run import train_and_measure

    with tempfile.TemporaryDirectory() as directory:
        data, training, spec = _material(recipe, directory, place)
        trainer = trainer_in_process(spec, place)
        key = backbone_key(recipe)
        if states_uri is not None and key is not None:
            trainer.engine.module.frozen_states = _states_in(storage.join(states_uri, key))
        stage = storage.join(directory, "training")
        return asdict(train_and_measure(trainer, training, data.gold, stage, eval_every=spec.config.eval_every))


def compute_missing_states(
    recipes: Sequence[Recipe], place: Place, states_uri: str, shard: int, shards: int
) -> Iterator[tuple[int, int]]:
    """One shard of `keep_states`, in this process; `recipes` have one backbone and differ in their data.

    Yields:
        Pairs computed so far, and how many there are to compute.
    """
    from pipeline.models.frozen_states import write_states
    from pipeline.models.reward_model import compute_states

    uri = storage.join(states_uri, str(backbone_key(recipes[0])))
    known, todo = _states_in(uri), {}
    with tempfile.TemporaryDirectory() as directory:
        for recipe in recipes:
            _, training, spec = _material(recipe, directory, place)
            # Pairs that another seed splits elsewhere, or whose label another run flips, are the same texts.
            todo |= {frozenset(keys): tokens for keys, tokens in _pairs_of(training) if not known.holds(keys)}
    mine = [tokens for keys, tokens in todo.items() if int(min(keys), 16) % shards == shard]
    yield 0, len(mine)
    if mine:
        model = trainer_in_process(spec, place).engine.module
    for first in range(0, len(mine), PAIRS_PER_FILE):
        states = compute_states(model, mine[first : first + PAIRS_PER_FILE], dtype=spec.config.backbone_dtype)
        with storage.writing(uri) as written:
            write_states(states, written)
        yield min(first + PAIRS_PER_FILE, len(mine)), len(mine)


def _material(recipe: Recipe, directory: str, place: Place) -> tuple[RunData, RewardData, RewardTrainerSpec]:
    """What a run reads; a backbone from noise is written into `directory`."""
    from pipeline.data.run_data import load_data
    from pipeline.learning.starting_policy import write_starting_policy

    place.take()
    backbone = recipe.reward.backbone or recipe.policy.checkpoint
    if backbone is None:
        backbone = storage.join(directory, "policy")
        write_starting_policy(recipe.policy, backbone, seed=recipe.seed)
    data = load_data(recipe)
    return data, *training_on(recipe, data, backbone)


def training_on(recipe: Recipe, data: RunData, backbone: str) -> tuple[RewardData, RewardTrainerSpec]:
    """The pairs of a recipe as tokens of the backbone's tokenizer, and what its trainer needs."""
    from pipeline.learning.reward_data import RewardData
    from pipeline.models.backbone import load_tokenizer

    with storage.reading(backbone) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
    training = RewardData.of(recipe, data, tokenizer)
    spec = RewardTrainerSpec(
        config=recipe.reward,
        ranks=recipe.cluster.reward,
        backbone_uri=backbone,
        statistics=training.statistics,
        num_steps=training.num_steps,
        seed=recipe.seed,
    )
    return training, spec


def trainer_in_process(spec: RewardTrainerSpec, place: Place) -> RewardTrainer:
    from pipeline.learning.engine import TorchEngine

    return reward_trainer(spec, partial(TorchEngine, device=place.device))


def _pairs_of(training: RewardData) -> Iterator[tuple[list[str], PromptGroup]]:
    from pipeline.models.frozen_states import response_keys
    from pipeline.models.packing import pack

    for pair in (*training.pairs, *training.heldout_pairs):
        yield response_keys(pack([pair.tokens])), pair.tokens


def _states_in(uri: str) -> FrozenStates:
    from pipeline.models.frozen_states import FrozenStates

    with storage.reading(uri) as directory:
        return FrozenStates.read(directory)
