"""Stage 2: the reward model, trained on preference pairs.

    python jobs/train_reward_model.py --recipe tiny

Runs the stage before it when its result is not in the workspace.
"""

from __future__ import annotations

from actors.rank_group import RankGroup
from actors.ranked_learner import RankedLearner
from actors.reward_trainer import RewardTrainerSpec, build_reward_trainer
from jobs.command_line import run_job
from jobs.prepare_policy import prepare_policy
from jobs.rooms import Rooms
from pipeline.benchmark.pairwise import longer_is_better
from pipeline.config.schema import Recipe
from pipeline.data.batching import step_indices
from pipeline.data.chat import require_chat_template
from pipeline.data.collate import PairCollator, tokenise_pairs
from pipeline.data.preferences import require_annotations, shared_prompts
from pipeline.data.score_statistics import ScoreStatistics
from pipeline.data.source import data_fingerprints, load_data
from pipeline.learning.reward_alarms import alarm_letters
from pipeline.loops.supervised_training import train
from pipeline.models.backbone import load_tokenizer, require_lora_targets
from pipeline.records import Metrics, StageResult
from pipeline.stages import storage
from pipeline.stages.workspace import StageDirectory

VERSION = 2


def train_reward_model(rooms: Rooms, policy: StageResult) -> StageResult:
    recipe = rooms.recipe
    return rooms.stages.run(
        "train_reward_model",
        VERSION,
        lambda stage: _train(stage, recipe, recipe.reward_training.backbone or policy.location),
        config=recipe.model_dump(mode="json", include={"seed", "objectives", "data", "reward_training"}),
        inputs=[policy],
        data=data_fingerprints(recipe),
        max_restarts=recipe.cluster.reward_training.max_restarts,
    )


def _train(stage: StageDirectory, recipe: Recipe, backbone_uri: str) -> Metrics:
    config = recipe.reward_training
    data = load_data(recipe)
    with storage.reading(backbone_uri) as directory:
        require_lora_targets(directory, config.lora, "reward_training")
        tokenizer = load_tokenizer(directory)
    require_chat_template(tokenizer)
    pairs = tokenise_pairs(data.train_pairs, tokenizer, max_length=config.max_length, drop_too_long=True)
    heldout = tokenise_pairs(
        data.heldout_pairs[: config.max_eval_pairs], tokenizer, max_length=config.max_length, drop_too_long=False
    )
    require_annotations(
        [p.pair for p in pairs], scores=config.head == "regression", margins=config.pair_loss.form != "bt"
    )
    statistics = ScoreStatistics.of((p.pair for p in pairs), recipe.objectives)
    shared = shared_prompts((p.pair.prompt for p in pairs), (p.pair.prompt for p in heldout))
    print(
        f"train_reward_model  {len(pairs)} of {len(data.train_pairs)} training pairs fit in "
        f"{config.max_length} tokens, "
        f"{len(heldout)} pairs held out, {shared} prompts on both sides",
        flush=True,
    )
    contamination = data.contamination.metrics() if data.contamination else {}
    for name, count in contamination.items():
        print(f"train_reward_model  {name} {count:.0f}", flush=True)
    num_steps = config.num_steps or max(1, len(pairs) // config.batch_pairs)
    collate = PairCollator(
        statistics=statistics,
        temperature=config.loss.supervision_temperature,
        seed=recipe.seed,
        target_from=config.loss.target_from,
    )
    spec = RewardTrainerSpec(
        config=config,
        ranks=recipe.cluster.reward_training,
        backbone_uri=backbone_uri,
        statistics=statistics,
        num_steps=num_steps,
        seed=recipe.seed,
    )
    deadlines = recipe.cluster.deadlines
    with RankGroup("reward training", spec.ranks, build_reward_trainer, (spec,), start_s=deadlines.start_s) as group:
        learner = RankedLearner(group, deadlines)
        metrics = train(
            learner,
            stage,
            batch_of=lambda step: collate(
                [pairs[i] for i in step_indices(len(pairs), config.batch_pairs, step, recipe.seed)], step
            ),
            heldout=collate(heldout, 0),
            num_steps=num_steps,
            eval_every=config.eval_every,
            checkpoint_every=config.checkpoint_every,
        )
        metrics |= learner.peak_memory()
    for letter in alarm_letters(metrics):
        print(f"train_reward_model  {letter}", flush=True)
    return (
        metrics
        | contamination
        | {
            "data/train_pairs": float(len(pairs)),
            "data/heldout_pairs": float(len(heldout)),
            "data/shared_prompts": float(shared),
            "eval/longer_is_better": longer_is_better(
                [len(c) - len(r) for c, r in (p.tokens.response_ids for p in heldout)]
            ),
        }
    )


if __name__ == "__main__":
    run_job(__doc__, lambda rooms: train_reward_model(rooms, prepare_policy(rooms)))
