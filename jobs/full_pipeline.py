"""The whole pipeline: fine-tune, train the reward model, align, benchmark, report.

    ray job submit --working-dir . -- python jobs/full_pipeline.py --recipe tiny
    python jobs/full_pipeline.py --recipe tiny alignment.num_steps=50

The same command resumes: finished stages are skipped, an unfinished one resumes after its last committed step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.align_policy import align_policy
from jobs.generate_benchmark import generate_benchmark
from jobs.run_job import run_job
from jobs.run_report import write_report
from jobs.sft import sft
from jobs.train_reward_model import scoring_model, train_judge

if TYPE_CHECKING:
    from jobs.open_job import Job


def run_pipeline(job: Job) -> None:
    from pipeline.loops.benchmark import require_prompts_fit

    stages, recipe, read_data, actors = job.stages, job.recipe, job.read_data, job.actors
    policy = sft(stages, recipe, read_data)
    require_prompts_fit(recipe, read_data(), policy.location)
    reward_model = scoring_model(stages, recipe, read_data, policy)
    judge = train_judge(stages, recipe, read_data, policy)
    aligned = align_policy(stages, recipe, read_data, actors, policy, reward_model)
    benchmark = generate_benchmark(stages, recipe, read_data, actors, policy, aligned, reward_model, judge)
    write_report(stages, recipe, policy, reward_model, aligned, benchmark, judge)


if __name__ == "__main__":
    run_job(__doc__, run_pipeline)
