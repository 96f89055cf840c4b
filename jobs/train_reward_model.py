"""Stage 2: the reward model, trained on preference pairs.

    python jobs/train_reward_model.py --recipe tiny

Runs the stage before it when its result is not in the workspace.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from jobs.run_job import run_job
from jobs.sft import sft
from pipeline.config.recipe import Recipe
from pipeline.records import StageResult
from pipeline.stages.runner import StageRunner

if TYPE_CHECKING:
    from jobs.open_job import Job, ReadData


def train_reward_model(stages: StageRunner, recipe: Recipe, read_data: ReadData, policy: StageResult) -> StageResult:
    from actors.deepspeed_learners import deepspeed_reward_trainer, open_ranked_learner
    from pipeline.loops.reward import reward_stage, run_reward_training

    cluster = recipe.cluster
    open_trainer = partial(
        open_ranked_learner, "reward training", deepspeed_reward_trainer, cluster.reward, cluster.deadlines
    )
    return stages.run(
        reward_stage(recipe, policy.fingerprint),
        lambda stage: run_reward_training(stage, recipe, read_data(), policy.location, open_trainer),
        max_restarts=cluster.reward.max_restarts,
    )


def main(job: Job) -> None:
    policy = sft(job.stages, job.recipe, job.read_data)
    train_reward_model(job.stages, job.recipe, job.read_data, policy)


if __name__ == "__main__":
    run_job(__doc__, main)
