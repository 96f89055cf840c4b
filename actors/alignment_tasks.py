"""Alignments of an experiment as Ray tasks, each in one process, on policies and reward models that they share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import ray

from actors.experiment_tasks import Outcome, Place, as_they_finish, remote_at, trainer_in_process, training_on
from actors.ppo_learner import PPOLearnerSpec, ppo_learner
from actors.sft_trainer import SFTTrainerSpec, sft_trainer
from cluster.resources import Demand
from pipeline.config.recipe import Recipe
from pipeline.records import Metrics, StageResult
from pipeline.stages import storage
from pipeline.stages.fingerprint import fingerprint
from pipeline.stages.workspace import StageDirectory

VERSION = 1
"""Of what a shared stage computes; part of its identity."""


def align_everywhere(
    recipes: Sequence[Recipe], demand: Demand, shared: str, *, max_restarts: int
) -> Iterator[tuple[int, Outcome]]:
    """Aligns the policy of every recipe against its own reward model, as many at a time as there is room for.

    The policies to start from and the reward models are trained first, one for all recipes that agree on it, and
    committed in `shared`; an error in one of them ends the runs that need it.

    Args, Yields:
        As `actors.experiment_tasks.train_everywhere`.
    """
    remote, place = remote_at(demand, max_restarts)
    policies: dict[str, ray.ObjectRef] = {}
    reward_models: dict[tuple[str, str], ray.ObjectRef] = {}
    waiting = {}
    for i, recipe in enumerate(recipes):
        start, model = policy_identity(recipe), reward_model_identity(recipe, policy_identity(recipe))
        if start not in policies:
            policies[start] = remote(prepare_start).remote(recipe, shared, place)
        if (start, model) not in reward_models:
            reward_models[start, model] = remote(train_shared_reward_model).remote(
                recipe, policies[start], shared, place
            )
        waiting[remote(align_one).remote(recipe, policies[start], reward_models[start, model], place)] = i
    yield from as_they_finish(waiting)


def policy_identity(recipe: Recipe) -> str:
    config = recipe.model_dump(mode="json", include={"seed", "data", "policy", "sft"})
    return fingerprint("sft", VERSION, config, [])


def reward_model_identity(recipe: Recipe, policy: str) -> str:
    config = recipe.model_dump(mode="json", include={"seed", "objectives", "data", "reward"})
    return fingerprint("train_reward_model", VERSION, config, [policy])


def prepare_start(recipe: Recipe, shared: str, place: Place) -> StageResult:
    """The policy before alignment, fine-tuned in this process, or as it lies in `shared`."""
    return _once("sft", policy_identity(recipe), shared, place, partial(_fine_tune, recipe=recipe, place=place))


def train_shared_reward_model(recipe: Recipe, policy: StageResult, shared: str, place: Place) -> StageResult:
    """The reward model on top of it, trained in this process, or as it lies in `shared`."""
    identity = reward_model_identity(recipe, policy.fingerprint)
    compute = partial(_train_reward_model, recipe=recipe, policy=policy, place=place)
    return _once("train_reward_model", identity, shared, place, compute)


def _once(
    name: str, identity: str, shared: str, place: Place, compute: Callable[[StageDirectory], Metrics]
) -> StageResult:
    stage = StageDirectory(storage.join(shared, f"{name}-{identity[:12]}"), name, identity)
    finished = stage.result()
    if finished is not None:
        return finished
    place.take()
    stage.delete_uncommitted()
    return stage.finish(compute(stage), {})


def _fine_tune(stage: StageDirectory, *, recipe: Recipe, place: Place) -> Metrics:
    from pipeline.data.batching import step_indices
    from pipeline.data.collate import tokenise_texts
    from pipeline.data.run_data import load_data
    from pipeline.learning.engine import TorchEngine
    from pipeline.learning.starting_policy import write_starting_policy
    from pipeline.loops.training import train

    config = recipe.sft
    if not config.num_steps:
        with storage.writing(stage.result_uri) as directory:
            write_starting_policy(recipe.policy, directory, seed=recipe.seed)
        return {}
    with tempfile.TemporaryDirectory() as start:
        tokenizer = write_starting_policy(recipe.policy, start, seed=recipe.seed)
        texts = tokenise_texts(load_data(recipe).sft_texts, tokenizer, max_length=config.max_length)
        heldout, texts = texts[: config.batch_size], texts[config.batch_size :]
        spec = SFTTrainerSpec(
            config=config,
            ranks=recipe.cluster.sft,
            policy_uri=start,
            dtype=recipe.policy.dtype,
            seed=recipe.seed,
        )
        return train(
            sft_trainer(spec, partial(TorchEngine, device=place.device)),
            stage,
            batch_of=lambda step: [texts[i] for i in step_indices(len(texts), config.batch_size, step, recipe.seed)],
            heldout=heldout,
            num_steps=config.num_steps,
            eval_every=config.eval_every,
            checkpoint_every=config.num_steps + 1,
        )


def _train_reward_model(stage: StageDirectory, *, recipe: Recipe, policy: StageResult, place: Place) -> Metrics:
    from pipeline.data.run_data import load_data
    from pipeline.loops.training import train

    config = recipe.reward
    training, spec = training_on(recipe, load_data(recipe), config.backbone or policy.location)
    return train(
        trainer_in_process(spec, place),
        stage,
        batch_of=training.batch,
        heldout=training.heldout,
        num_steps=training.num_steps,
        eval_every=config.eval_every,
        checkpoint_every=training.num_steps + 1,
    )


def align_one(recipe: Recipe, policy: StageResult, reward_model: StageResult, place: Place) -> dict[str, Any]:
    """Plain data of the `RunResult` of one recipe, aligned in this process.

    Args:
        policy, reward_model: what it starts from, and what it is aligned against.
    """
    import torch

    from pipeline.data.prompts import tokenise_prompts
    from pipeline.data.run_data import load_data
    from pipeline.evaluation.overoptimization import GoldReward
    from pipeline.evaluation.reward_scale import RewardScale
    from pipeline.evaluation.reward_scorer import RewardModelScorer
    from pipeline.experiments.alignment_run import align_and_measure
    from pipeline.learning.engine import TorchEngine
    from pipeline.learning.ppo_learner import frozen_reference
    from pipeline.models.backbone import load_tokenizer
    from pipeline.rollouts.numerics_gate import choose_probes
    from pipeline.rollouts.publishing import publish_checkpoint
    from pipeline.rollouts.torch_rollouts import TorchRollouts

    place.take()
    config, dtype = recipe.alignment, recipe.policy.dtype
    data = load_data(recipe)
    assert data.gold is not None, "the plan refuses other data"
    with (
        storage.reading(policy.location) as start,
        storage.reading(reward_model.location) as scored_by,
        tempfile.TemporaryDirectory() as directory,
    ):
        tokenizer = load_tokenizer(start)
        prompts = tokenise_prompts(data.train_prompts, tokenizer, max_prompt_tokens=config.max_prompt_tokens)
        probes = tuple(choose_probes(prompts, vocabulary_size=len(tokenizer), seed=recipe.seed))
        published = storage.join(directory, "published")
        spec = PPOLearnerSpec(
            config=config,
            ranks=recipe.cluster.alignment,
            policy_uri=start,
            reward_model_uri=scored_by,
            dtype=dtype,
            probes=probes,
            publish_directory=published,
            seed=recipe.seed,
        )
        scorer = RewardModelScorer.load(
            scored_by, max_tokens_per_batch=config.max_tokens_per_micro_batch, device=place.device
        )
        result = align_and_measure(
            TorchRollouts(start, dtype=dtype, gate_tolerance=config.gate_tolerance, device=place.device),
            scorer,
            ppo_learner(
                spec,
                partial(TorchEngine, device=place.device),
                lambda frozen: frozen_reference(
                    frozen.eval().requires_grad_(False).to(place.device), dtype=dtype, device=torch.device(place.device)
                ),
            ),
            GoldReward.of(data.gold, data.heldout_pairs),
            train_prompts=data.train_prompts,
            heldout_prompts=data.heldout_prompts,
            tokenizer=tokenizer,
            publish=lambda checkpoint, version: publish_checkpoint(
                checkpoint, storage.join(published, f"benchmark-{version}"), probes, dtype=dtype, version=version
            ),
            start=start,
            directory=storage.join(directory, "alignment"),
            alignment=config,
            benchmark=recipe.benchmark,
            reward_scale=RewardScale.of(scorer.card),
            seed=recipe.seed,
        )
    about_the_model = {f"reward_model/{name}": reward_model.metrics[f"eval/{name}"] for name in ("accuracy", "nll")}
    return asdict(result) | {"metrics": result.metrics | about_the_model}
