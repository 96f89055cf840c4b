"""Stage 3: alignment of the policy, against its rewards or to preference pairs directly.

    python jobs/align_policy.py --recipe tiny
    python jobs/align_policy.py --recipe tiny alignment.algorithm=dpo

Runs the stages before it when their results are not in the workspace. A direct method needs no reward model, and
neither do rewards without `model: this_run`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from jobs.run_job import run_job
from jobs.sft import sft
from jobs.train_reward_model import train_reward_model
from pipeline.config.recipe import Recipe
from pipeline.records import StageResult
from pipeline.stages.runner import StageRunner

if TYPE_CHECKING:
    from jobs.open_job import Job, ReadData
    from jobs.shared_actors import SharedActors
    from pipeline.learning.builders import DirectTrainerSpec, PPOLearnerSpec
    from pipeline.loops.align_policy import AlignmentPorts
    from pipeline.ports import DirectLearner
    from pipeline.stages.workspace import StageDirectory


def align_policy(
    stages: StageRunner,
    recipe: Recipe,
    read_data: ReadData,
    actors: SharedActors,
    policy: StageResult,
    reward_model: StageResult | None,
) -> StageResult:
    """Args: reward_model: None where the recipe trains none, or has it for the benchmark alone."""
    from pipeline.loops.align_policy import alignment_stage, run_alignment

    needed = reward_model if recipe.alignment.needs_reward_model else None
    if needed is not None and recipe.alignment.is_direct:
        return align_to_own_pairs(stages, recipe, read_data, actors, policy, needed)
    if recipe.alignment.is_direct:
        return align_directly(stages, recipe, read_data, policy)
    return stages.run(
        alignment_stage(recipe, policy.fingerprint, None if needed is None else needed.fingerprint),
        lambda stage: run_alignment(
            stage,
            recipe,
            read_data(),
            policy_uri=policy.location,
            reward_model_uri=None if needed is None else needed.location,
            publish_directory=actors.publish_directory,
            open_ports=partial(_open_ports, recipe, actors, policy, needed, stage),
        ),
        max_restarts=recipe.cluster.alignment.max_restarts,
    )


def align_directly(stages: StageRunner, recipe: Recipe, read_data: ReadData, policy: StageResult) -> StageResult:
    from actors.deepspeed_learners import open_ranked_direct_learner
    from pipeline.loops import direct_alignment

    ranks = recipe.cluster.alignment
    return direct_alignment.align_directly(
        recipe,
        read_data,
        policy,
        workspace=stages.workspace.uri,
        run_stage=partial(stages.run, max_restarts=ranks.max_restarts),
        open_trainer=partial(open_ranked_direct_learner, ranks, recipe.cluster.deadlines),
    )


def align_to_own_pairs(
    stages: StageRunner,
    recipe: Recipe,
    read_data: ReadData,
    actors: SharedActors,
    policy: StageResult,
    reward_model: StageResult,
) -> StageResult:
    """Rounds of direct alignment to responses that the policy samples and the reward model ranks."""
    from actors.deepspeed_learners import open_ranked_direct_learner
    from pipeline.loops.policy_pairs import OwnPairs, RankingPorts

    @contextmanager
    def open_ranking() -> Iterator[RankingPorts]:
        rollouts = actors.rollouts(policy)
        try:
            yield RankingPorts(rollouts=rollouts, scorer=actors.scorer(reward_model))
        finally:
            rollouts.sleep()  # the learner of the round may be built on the engines' GPUs

    @contextmanager
    def open_trainer(spec: DirectTrainerSpec) -> Iterator[DirectLearner]:
        deadlines, placement = recipe.cluster.deadlines, actors.shared_gpus()
        with open_ranked_direct_learner(ranks, deadlines, spec, placement=placement) as learner:
            yield learner

    ranks = recipe.cluster.alignment
    own = OwnPairs(
        experiment=recipe,
        start=policy,
        reward_model=reward_model,
        workspace=stages.workspace.uri,
        publish_directory=actors.publish_directory,
        open_trainer=open_trainer,
        open_ranking=open_ranking,
    )
    return own.align(read_data, partial(stages.run, max_restarts=ranks.max_restarts))


@contextmanager
def _open_ports(
    recipe: Recipe,
    actors: SharedActors,
    policy: StageResult,
    reward_model: StageResult | None,
    stage: StageDirectory,
    spec: PPOLearnerSpec,
) -> Iterator[AlignmentPorts]:
    from actors.deepspeed_learners import deepspeed_ppo_learner
    from actors.rank_group import RankGroup
    from actors.ranked_learner import RankedPolicyLearner, RankedSender
    from actors.step_profile import StepProfile, profiled
    from cluster.rollout_plan import WeightReceivers
    from pipeline.loops.align_policy import AlignmentPorts
    from pipeline.rewards.opened import open_sources

    ranks, deadlines = recipe.cluster.alignment, recipe.cluster.deadlines
    rollouts = actors.rollouts(policy)
    with (
        RankGroup("PPO learner", ranks, start_s=deadlines.start_s, placement=actors.shared_gpus()) as group,
        ExitStack() as exits,
    ):
        sources = open_sources(recipe.alignment.rewards, actors.reward_openers(reward_model), exits)
        rollouts.sleep()  # the learner may be built on the engines' GPUs
        group.build(deepspeed_ppo_learner, spec, ranks)
        receivers = WeightReceivers(
            weight_transfer=actors.rollout_plan.weight_transfer,
            dtype=spec.dtype,
            shards=recipe.cluster.rollout.shards,
        )
        sender = RankedSender(group, receivers, deadline_s=deadlines.weights_s)
        with rollouts.fed_by(sender):
            sends = actors.rollout_plan.weight_transfer != "shm"
            learner = RankedPolicyLearner(group, deadlines, sends_weights=sends)
            ports = AlignmentPorts(rollouts=rollouts, sources=sources, learner=learner)
            if recipe.profile.steps:
                processes = {"rank-0.json.gz": group.first, "engine-0.json.gz": rollouts.first_worker}
                ports = profiled(ports, StepProfile(recipe.profile.steps, stage.uri, stage.name, processes))
            yield ports


def main(job: Job) -> None:
    policy = sft(job.stages, job.recipe, job.read_data)
    needed = job.recipe.alignment.needs_reward_model
    reward_model = train_reward_model(job.stages, job.recipe, job.read_data, policy) if needed else None
    align_policy(job.stages, job.recipe, job.read_data, job.actors, policy, reward_model)


if __name__ == "__main__":
    run_job(__doc__, main)
