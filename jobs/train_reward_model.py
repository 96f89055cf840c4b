"""Stage 2: the reward model, trained on preference pairs.

    python jobs/train_reward_model.py --recipe tiny

Runs the stage before it when its result is not in the workspace.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from cluster.resources import Demand
from jobs.run_job import run_job
from jobs.sft import sft
from pipeline.config.recipe import ExperimentConfig, Recipe
from pipeline.records import Metrics, StageResult
from pipeline.stages import storage
from pipeline.stages.runner import StageRunner

if TYPE_CHECKING:
    from jobs.open_job import Job, ReadData
    from pipeline.data.run_data import RunData
    from pipeline.stages.workspace import StageDirectory


def train_reward_model(stages: StageRunner, recipe: Recipe, read_data: ReadData, policy: StageResult) -> StageResult:
    from pipeline.data.run_data import pairs_of_the_reward_model
    from pipeline.loops.reward import reward_stage

    return stages.run(
        reward_stage(recipe, policy.fingerprint),
        lambda stage: _train(
            stage, stages, recipe, recipe, pairs_of_the_reward_model(read_data(), recipe.judge), policy
        ),
        max_restarts=recipe.cluster.reward.max_restarts,
    )


def scoring_model(stages: StageRunner, recipe: Recipe, read_data: ReadData, policy: StageResult) -> StageResult | None:
    """The reward model that scores the answers of the benchmark; None where rewards without one do."""
    return train_reward_model(stages, recipe, read_data, policy) if recipe.scores_by_reward_model else None


def train_judge(stages: StageRunner, recipe: Recipe, read_data: ReadData, policy: StageResult) -> StageResult | None:
    """The judge of the benchmark; None where the recipe has none."""
    from pipeline.data.run_data import pairs_of_the_judge
    from pipeline.loops.reward import as_judge, judge_stage

    judge = recipe.judge
    if judge is None:
        return None
    return stages.run(
        judge_stage(recipe, policy.fingerprint),
        lambda stage: _train(stage, stages, recipe, as_judge(recipe), pairs_of_the_judge(read_data(), judge), policy),
        max_restarts=recipe.cluster.reward.max_restarts,
    )


def _train(
    stage: StageDirectory,
    stages: StageRunner,
    recipe: Recipe,
    experiment: ExperimentConfig,
    data: RunData,
    policy: StageResult,
) -> Metrics:
    """Trains the reward model of `experiment`. States of a frozen backbone are kept for all of `recipe`'s pairs."""
    from actors.deepspeed_learners import deepspeed_reward_trainer, open_ranked_learner
    from actors.frozen_state_tasks import keep_states, states_of
    from pipeline.loops.reward import run_reward_training

    cluster = recipe.cluster
    backbone = recipe.reward.backbone or policy.location
    recipe = recipe.model_copy(update={"reward": recipe.reward.model_copy(update={"backbone": backbone})})
    states_uri = storage.join(stages.workspace.uri, "states")
    keep_states(
        [recipe],
        Demand(
            role="states of the frozen backbone",
            setting="cluster.reward.ranks",
            count=1,
            cpus=cluster.reward.cpus_per_rank,
            gpus=min(1.0, cluster.reward.gpus_per_rank),
        ),
        states_uri,
        max_restarts=cluster.reward.max_restarts,
        name=stage.name,
    )
    open_trainer = partial(
        open_ranked_learner, "reward training", deepspeed_reward_trainer, cluster.reward, cluster.deadlines
    )
    return run_reward_training(
        stage, experiment, data, policy.location, open_trainer, states_uri=states_of(recipe, states_uri)
    )


def main(job: Job) -> None:
    policy = sft(job.stages, job.recipe, job.read_data)
    train_reward_model(job.stages, job.recipe, job.read_data, policy)


if __name__ == "__main__":
    run_job(__doc__, main)
