"""Stage 1: the policy before alignment, a checkpoint as it is, or fine-tuned, or made from scratch.

python jobs/sft.py --recipe tiny
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from jobs.run_job import run_job
from pipeline.config.recipe import Recipe
from pipeline.records import StageResult
from pipeline.stages.runner import StageRunner

if TYPE_CHECKING:
    from jobs.open_job import ReadData


def sft(stages: StageRunner, recipe: Recipe, read_data: ReadData) -> StageResult:
    from actors.deepspeed_learners import deepspeed_sft_trainer, open_ranked_learner
    from pipeline.loops.sft import run_sft, sft_stage

    cluster = recipe.cluster
    open_trainer = partial(
        open_ranked_learner, "policy training", deepspeed_sft_trainer, cluster.sft, cluster.deadlines
    )
    return stages.run(
        sft_stage(recipe),
        lambda stage: run_sft(stage, recipe, read_data, open_trainer),
        max_restarts=cluster.sft.max_restarts,
    )


if __name__ == "__main__":
    run_job(__doc__, lambda job: sft(job.stages, job.recipe, job.read_data))
