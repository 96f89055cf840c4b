"""Stage 2: the reward model, trained on preference pairs.

    python jobs/train_reward_model.py --recipe tiny

Runs the stage before it when its result is not in the workspace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.run_job import run_job
from jobs.sft import sft
from pipeline.data.run_data import data_fingerprints
from pipeline.evaluation.reward_alarms import alarm_messages
from pipeline.loops.training import train
from pipeline.records import Metrics, StageResult
from pipeline.stages import storage
from pipeline.stages.workspace import KeptCheckpoints, StageDirectory

if TYPE_CHECKING:
    from jobs.job_context import JobContext

VERSION = 2


def train_reward_model(job: JobContext, policy: StageResult) -> StageResult:
    recipe = job.recipe
    return job.stages.run(
        "train_reward_model",
        VERSION,
        lambda stage: _train(stage, job, recipe.reward.backbone or policy.location),
        config=recipe.model_dump(mode="json", include={"seed", "objectives", "data", "reward"}),
        inputs=[policy],
        data=data_fingerprints(recipe),
        keep=KeptCheckpoints(best_by=recipe.reward.keep_best),
        max_restarts=recipe.cluster.reward.max_restarts,
    )


def _train(stage: StageDirectory, job: JobContext, backbone_uri: str) -> Metrics:
    from actors.rank_group import RankGroup
    from actors.ranked_learner import RankedLearner
    from actors.reward_trainer import RewardTrainerSpec, build_reward_trainer
    from pipeline.learning.reward_data import RewardData
    from pipeline.models.backbone import load_tokenizer, require_lora_targets

    recipe, config = job.recipe, job.recipe.reward
    ranks, deadlines = recipe.cluster.reward, recipe.cluster.deadlines
    data = job.data
    with storage.reading(backbone_uri) as directory:
        require_lora_targets(directory, config.lora, "reward")
        tokenizer = load_tokenizer(directory)
    contamination = data.contamination.metrics() if data.contamination else {}
    training = RewardData.of(recipe, data, tokenizer)
    about_the_data = training.metrics()
    print(
        f"train_reward_model  {len(training.pairs)} of {len(data.train_pairs)} training pairs fit in "
        f"{config.max_length} tokens, {len(training.heldout_pairs)} pairs held out, "
        f"{about_the_data['data/shared_prompts']:.0f} prompts on both sides",
        flush=True,
    )
    for name, count in contamination.items():
        print(f"train_reward_model  {name} {count:.0f}", flush=True)
    spec = RewardTrainerSpec(
        config=config,
        ranks=ranks,
        backbone_uri=backbone_uri,
        statistics=training.statistics,
        num_steps=training.num_steps,
        seed=recipe.seed,
    )
    with RankGroup("reward training", ranks, start_s=deadlines.start_s) as group:
        group.build(build_reward_trainer, spec)
        learner = RankedLearner(group, deadlines)
        metrics = train(
            learner,
            stage,
            batch_of=training.batch,
            heldout=training.heldout,
            num_steps=training.num_steps,
            eval_every=config.eval_every,
            checkpoint_every=config.checkpoint_every,
        )
        metrics |= learner.peak_memory()
    for letter in alarm_messages(metrics):
        print(f"train_reward_model  {letter}", flush=True)
    return metrics | contamination | about_the_data


if __name__ == "__main__":
    run_job(__doc__, lambda job: train_reward_model(job, sft(job)))
