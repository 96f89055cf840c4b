"""Stage 4: answers of the base and the aligned policy on held-out prompts, scored, and their win rate.

    python jobs/generate_benchmark.py --recipe tiny

Runs the stages before it when their results are not in the workspace. With --benchmark, any model answers the questions
of AlpacaEval, Arena-Hard or MT-Bench instead; see --benchmark alpaca_eval --help.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from jobs.align_policy import align_policy
from jobs.run_job import run_job
from jobs.sft import sft
from jobs.train_reward_model import train_judge, train_reward_model
from pipeline.config.recipe import Recipe
from pipeline.records import StageResult
from pipeline.stages.runner import StageRunner

if TYPE_CHECKING:
    from jobs.open_job import Job, ReadData
    from jobs.shared_actors import SharedActors


def generate_benchmark(
    stages: StageRunner,
    recipe: Recipe,
    read_data: ReadData,
    actors: SharedActors,
    policy: StageResult,
    aligned: StageResult,
    reward_model: StageResult,
    judge: StageResult | None,
) -> StageResult:
    from pipeline.loops.benchmark import BenchmarkPorts, benchmark_stage, run_benchmark

    return stages.run(
        benchmark_stage(
            recipe,
            policy.fingerprint,
            aligned.fingerprint,
            reward_model.fingerprint,
            None if judge is None else judge.fingerprint,
        ),
        lambda stage: run_benchmark(
            stage,
            recipe,
            read_data(),
            policy_uri=policy.location,
            aligned_uri=aligned.location,
            publish_directory=actors.publish_directory,
            open_ports=lambda: BenchmarkPorts(
                rollouts=actors.rollouts(policy),
                scorer=actors.scorer(reward_model),
                judge=None if judge is None else actors.judge(judge),
            ),
        ),
    )


def main(job: Job) -> None:
    stages, recipe, read_data, actors = job.stages, job.recipe, job.read_data, job.actors
    policy = sft(stages, recipe, read_data)
    reward_model = train_reward_model(stages, recipe, read_data, policy)
    judge = train_judge(stages, recipe, read_data, policy)
    aligned = align_policy(stages, recipe, read_data, actors, policy, reward_model)
    generate_benchmark(stages, recipe, read_data, actors, policy, aligned, reward_model, judge)


def command() -> None:
    """The stage over a workspace, or any model on an official benchmark."""
    if any(argument.split("=")[0] == "--benchmark" for argument in sys.argv[1:]):
        from jobs.generate_answers import generate_answers_command

        generate_answers_command()
    else:
        run_job(__doc__, main)


if __name__ == "__main__":
    command()
