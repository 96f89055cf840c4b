"""Runs of an experiment as Ray tasks, each a whole reward training in one process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayTaskError, WorkerCrashedError

from actors.deaths import DIED
from actors.reward_trainer import RewardTrainerSpec, reward_trainer
from cluster.resources import Demand
from pipeline.config.schema import Recipe
from pipeline.errors import PipelineError, WorkerDied
from pipeline.stages import storage

LOOK_AGAIN_S = 60.0

Outcome = dict[str, Any] | PipelineError
"""Plain data of a `RunResult`, or the error that ended the run."""


def run_everywhere(recipes: Sequence[Recipe], demand: Demand, *, max_restarts: int) -> Iterator[tuple[int, Outcome]]:
    """Trains the reward model of every recipe, as many at a time as the cluster has room for.

    Args:
        recipes: one a run.
        demand: what one run holds.
        max_restarts: how often a run is begun anew after its process died.

    Yields:
        (index of the recipe, outcome), as runs finish. An error ends its own run only.
    """
    task = ray.remote(train_one).options(num_cpus=demand.cpus, num_gpus=demand.gpus, max_retries=max_restarts)
    data_root = os.environ.get("VRM_DATA_ROOT", "")
    waiting = {task.remote(recipe, demand.cpus, demand.gpus, data_root): i for i, recipe in enumerate(recipes)}
    try:
        while waiting:
            # How long a training may take nobody can say beforehand; the job prints every run that ends.
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=LOOK_AGAIN_S)
            for reference in done:
                yield waiting.pop(reference), _outcome(reference)
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


def _outcome(finished: ray.ObjectRef) -> Outcome:
    try:
        return ray.get(finished, timeout=LOOK_AGAIN_S)
    except RayTaskError as error:
        if isinstance(error.cause, PipelineError):
            return error.cause
        raise
    except (*DIED, WorkerCrashedError) as error:
        return WorkerDied(f"its process died, most often for want of memory: {error}. The same command runs it again.")


def train_one(recipe: Recipe, cpus: float, gpus: float, data_root: str) -> dict[str, Any]:
    """Plain data of the `RunResult` of one recipe, trained in this process."""
    import torch

    from pipeline.data.source import DATA_ROOT, load_data
    from pipeline.experiments.reward_run import train_and_measure
    from pipeline.learning.engine import TorchEngine
    from pipeline.learning.reward_data import RewardTrainingData
    from pipeline.learning.starting_policy import write_starting_policy
    from pipeline.models.backbone import load_tokenizer

    os.environ[DATA_ROOT] = data_root
    torch.set_num_threads(max(1, int(cpus)))
    config = recipe.reward_training
    with tempfile.TemporaryDirectory() as directory:
        backbone_uri = config.backbone or recipe.policy.checkpoint
        if backbone_uri is None:
            backbone_uri = storage.join(directory, "policy")
            write_starting_policy(recipe.policy, backbone_uri, seed=recipe.seed)
        with storage.reading(backbone_uri) as checkpoint:
            tokenizer = load_tokenizer(checkpoint)
        data = load_data(recipe)
        training = RewardTrainingData.of(recipe, data, tokenizer)
        spec = RewardTrainerSpec(
            config=config,
            ranks=recipe.cluster.reward_training,
            backbone_uri=backbone_uri,
            statistics=training.statistics,
            num_steps=training.num_steps,
            seed=recipe.seed,
        )
        trainer = reward_trainer(spec, partial(TorchEngine, device="cuda" if gpus else "cpu"))
        stage = storage.join(directory, "training")
        return asdict(train_and_measure(trainer, training, data.gold, stage, eval_every=config.eval_every))
