"""The whole pipeline: prepare, train the reward model, align, benchmark, report.

    ray job submit --working-dir . -- python jobs/full_pipeline.py --recipe tiny
    python jobs/full_pipeline.py --recipe tiny alignment.num_steps=50

The same command resumes: finished stages are skipped, an unfinished one goes on behind its last committed step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.run_job import run_job

if TYPE_CHECKING:
    from jobs.job_context import JobContext


def run_pipeline(job: JobContext) -> None:
    # Imported here: the stages bring torch and ray, which a dry run does without.
    from jobs.align_policy import align_policy
    from jobs.generate_benchmark import generate_benchmark
    from jobs.sft import sft
    from jobs.train_reward_model import train_reward_model
    from jobs.write_report import write_report

    policy = sft(job)
    reward_model = train_reward_model(job, policy)
    aligned = align_policy(job, policy, reward_model)
    benchmark = generate_benchmark(job, policy, aligned, reward_model)
    write_report(job, policy, reward_model, aligned, benchmark)


if __name__ == "__main__":
    run_job(__doc__, run_pipeline)
