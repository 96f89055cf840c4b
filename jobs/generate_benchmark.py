"""Stage 4: answers of the base and the aligned policy on held-out prompts, scored, and their win rate.

    python jobs/generate_benchmark.py --recipe tiny

Runs the stages before it when their results are not in the workspace. With --benchmark, any model answers the questions
of AlpacaEval, Arena-Hard or MT-Bench instead; see --benchmark alpaca_eval --help.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from jobs.align_policy import align_policy
from jobs.run_job import run_job
from jobs.sft import sft
from jobs.train_reward_model import scoring_model, train_judge
from pipeline.config.recipe import Recipe
from pipeline.records import StageResult
from pipeline.stages.runner import StageRunner

if TYPE_CHECKING:
    from jobs.open_job import Job, ReadData
    from jobs.shared_actors import SharedActors
    from pipeline.data.prompts import PromptColumns
    from pipeline.ports import RewardSources


def generate_benchmark(
    stages: StageRunner,
    recipe: Recipe,
    read_data: ReadData,
    actors: SharedActors,
    policy: StageResult,
    aligned: StageResult,
    reward_model: StageResult | None,
    judge: StageResult | None,
) -> StageResult:
    """Args: reward_model: None where the recipe trains none; the rewards of the alignment then score the answers."""
    from pipeline.loops.benchmark import BenchmarkPorts, benchmark_stage, run_benchmark

    exits = ExitStack()

    def open_ports(columns: Mapping[str, PromptColumns]) -> BenchmarkPorts:
        return BenchmarkPorts(
            rollouts=actors.rollouts(policy),
            rewards=benchmark_rewards_of(recipe, actors, aligned, reward_model, columns, exits),
            judge=None if judge is None else actors.judge(judge),
        )

    with exits:
        return stages.run(
            benchmark_stage(
                recipe,
                policy.fingerprint,
                aligned.fingerprint,
                None if reward_model is None else reward_model.fingerprint,
                None if judge is None else judge.fingerprint,
            ),
            lambda stage: run_benchmark(
                stage,
                recipe,
                read_data(),
                policy_uri=policy.location,
                aligned_uri=aligned.location,
                publish_directory=actors.publish_directory,
                open_ports=open_ports,
            ),
        )


def benchmark_rewards_of(
    recipe: Recipe,
    actors: SharedActors,
    aligned: StageResult,
    reward_model: StageResult | None,
    columns: Mapping[str, PromptColumns],
    exits: ExitStack,
) -> RewardSources:
    """The reward model of the run; without one the rewards of the alignment, in its units."""
    from pipeline.loops.reward_scales import scales_in
    from pipeline.rewards.opened import ScaledScorer, benchmark_rewards, open_sources, rewards_of_model

    if reward_model is not None:
        return rewards_of_model(ScaledScorer(scorer=actors.scorer(reward_model), scale=None))
    sources = open_sources(recipe.alignment.rewards, actors.reward_openers(None), exits)
    return benchmark_rewards(sources, measured=scales_in(aligned.metrics), columns=columns)


def main(job: Job) -> None:
    stages, recipe, read_data, actors = job.stages, job.recipe, job.read_data, job.actors
    policy = sft(stages, recipe, read_data)
    reward_model = scoring_model(stages, recipe, read_data, policy)
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
