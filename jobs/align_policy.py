"""Stage 3: PPO alignment of the policy against the reward model.

    python jobs/align_policy.py --recipe tiny

Runs the stages before it when their results are not in the workspace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.ppo_learner import PPOLearnerSpec, build_ppo_learner
from jobs.run_job import run_job
from jobs.sft import sft
from jobs.train_reward_model import train_reward_model
from pipeline.data.prompts import PromptStream, tokenise_prompts
from pipeline.data.run_data import data_fingerprints
from pipeline.records import Metrics, StageResult
from pipeline.rollouts.numerics_gate import choose_probes
from pipeline.stages import storage
from pipeline.stages.workspace import KeptCheckpoints, StageDirectory

if TYPE_CHECKING:
    from jobs.job_context import JobContext

VERSION = 2


def align_policy(job: JobContext, policy: StageResult, reward_model: StageResult) -> StageResult:
    recipe = job.recipe
    return job.stages.run(
        "align_policy",
        VERSION,
        lambda stage: _align(stage, job, policy, reward_model),
        config=recipe.model_dump(mode="json", include={"seed", "data", "alignment", "policy"}),
        inputs=[policy, reward_model],
        data=data_fingerprints(recipe),
        keep=KeptCheckpoints(newest=recipe.alignment.keep_checkpoints, best_by=recipe.alignment.keep_best),
        max_restarts=recipe.cluster.alignment.max_restarts,
    )


def _align(stage: StageDirectory, job: JobContext, policy: StageResult, reward_model: StageResult) -> Metrics:
    from actors.rank_group import RankGroup
    from actors.ranked_learner import RankedPolicyLearner, RankedSender
    from pipeline.evaluation.overoptimization import GoldReward
    from pipeline.evaluation.reward_scale import RewardScale
    from pipeline.loops.alignment import align
    from pipeline.models.backbone import load_tokenizer, require_context, require_lora_targets, require_same_tokens
    from pipeline.models.reward_model import read_card

    recipe, config = job.recipe, job.recipe.alignment
    with storage.reading(policy.location) as directory:
        require_lora_targets(directory, config.ppo.lora, "alignment.ppo")
        tokenizer = load_tokenizer(directory)
        require_context(directory, config.max_prompt_tokens + config.max_response_tokens, "alignment")
    with storage.reading(reward_model.location) as directory:
        card = read_card(directory)
        if config.ppo.critic_reads_policy_tokens:
            require_same_tokens(tokenizer, directory)
    data = job.data
    prompts = tokenise_prompts(data.train_prompts, tokenizer, max_prompt_tokens=config.max_prompt_tokens)
    spec = PPOLearnerSpec(
        config=config,
        ranks=recipe.cluster.alignment,
        policy_uri=policy.location,
        reward_model_uri=reward_model.location,
        dtype=recipe.policy.dtype,
        probes=tuple(choose_probes(prompts, vocabulary_size=len(tokenizer), seed=recipe.seed)),
        publish_directory=job.publish_directory,
        seed=recipe.seed,
    )
    deadlines = recipe.cluster.deadlines
    rollouts = job.rollouts(policy)
    with RankGroup("PPO learner", spec.ranks, start_s=deadlines.start_s, placement=job.shared_gpus()) as group:
        scorer = job.scorer(reward_model)
        rollouts.sleep()  # the learner may be built on the engines' GPUs
        group.build(build_ppo_learner, spec)
        learner = RankedPolicyLearner(group, deadlines)
        sender = RankedSender(
            group, job.rollout_plan.weight_transfer, dtype=recipe.policy.dtype, deadline_s=deadlines.weights_s
        )
        with rollouts.fed_by(sender):
            metrics = align(
                rollouts,
                scorer,
                learner,
                PromptStream(prompts=tuple(prompts), seed=recipe.seed),
                stage,
                config,
                reward_scale=RewardScale.of(card),
                gold=None if data.gold is None else GoldReward.of(data.gold, data.heldout_pairs),
            )
        return metrics | learner.peak_memory()


if __name__ == "__main__":

    def main(job: JobContext) -> None:
        policy = sft(job)
        align_policy(job, policy, train_reward_model(job, policy))

    run_job(__doc__, main)
