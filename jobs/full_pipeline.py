"""The whole pipeline: prepare, train the reward model, align, benchmark, report.

    ray job submit --working-dir . -- python jobs/full_pipeline.py --recipe tiny
    python jobs/full_pipeline.py --recipe tiny alignment.num_steps=50

The same command resumes: finished stages are skipped, an unfinished one goes on behind its last committed step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.command_line import run_job

if TYPE_CHECKING:
    from jobs.rooms import Rooms


def run_pipeline(rooms: Rooms) -> None:
    # Imported here: the stages bring torch and ray, which a dry run does without.
    from jobs.align_policy import align_policy
    from jobs.generate_benchmark import generate_benchmark
    from jobs.prepare_policy import prepare_policy
    from jobs.train_reward_model import train_reward_model
    from jobs.write_report import write_report

    policy = prepare_policy(rooms)
    reward_model = train_reward_model(rooms, policy)
    aligned = align_policy(rooms, policy, reward_model)
    benchmark = generate_benchmark(rooms, policy, aligned, reward_model)
    write_report(rooms, policy, reward_model, aligned, benchmark)


if __name__ == "__main__":
    run_job(__doc__, run_pipeline)
