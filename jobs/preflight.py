"""What a job looks at before it starts anything: a remote workspace, its data files, checkpoints and rewards.

Imports neither torch nor ray, so that bad input is answered at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.planning.decoder_shape import policy_shape
from cluster.planning.training_loads import check_sequence_groups
from pipeline.config.recipe import Recipe
from pipeline.config.rewards import THIS_RUNS_MODEL
from pipeline.data.recipe_files import check_data
from pipeline.errors import CheckpointError
from pipeline.models.checkpoint_files import check_checkpoint
from pipeline.models.tensor_parallel import check_shards_of, check_tensor_parallel
from pipeline.stages import storage
from pipeline.stages.workspace import StageDirectory
from pipeline.tracking.logger_names import require_loggers


@dataclass(frozen=True, kw_only=True)
class NamedCheckpoint:
    """A checkpoint of a recipe, and the stage that reads it."""

    setting: str
    checkpoint: str
    stage: str


def check_recipe(recipe: Recipe, *, workspace: str | None = None) -> None:
    """Opens each data file, each checkpoint and each reward of a recipe; prints what was looked at, and for how long.

    Args:
        workspace: a remote one is written to, and what was written deleted. In any, a stage may have finished with a
            checkpoint. Then the checkpoint may be gone.

    Raises:
        ConfigError, DataError, CheckpointError, WorkerError, WorkspaceError: one of them, or a logger, cannot be used.
    """
    started = time.monotonic()
    require_loggers(recipe.logging)
    seen, unseen = [], []
    if workspace is not None and not storage.is_local(workspace):
        storage.require_writable(workspace, needs_bytes=0)
        seen.append("workspace")
    num_files = check_data(recipe)
    seen.append(f"{num_files} data file{'' if num_files == 1 else 's'}")
    on_the_hub = [source.hub for source in recipe.data.sources if source.hub is not None]
    if on_the_hub:
        unseen.append(f"data.sources of the hub: {', '.join(on_the_hub)}")
    for named in _checkpoints(recipe):
        try:
            reason = check_checkpoint(named.checkpoint)
        except CheckpointError:
            if workspace is None or not _is_in_a_finished_stage(named, workspace):
                raise
            reason = f"{named.stage} is finished"
        if reason is None:
            seen.append(named.setting)
        else:
            unseen.append(f"{named.setting} = {named.checkpoint} ({reason})")
    if recipe.alignment.rewards != (THIS_RUNS_MODEL,):
        from pipeline.rewards.preflight import check_rewards

        seen += check_rewards(recipe.alignment.rewards)
    _check_shards(recipe)
    check_sequence_groups(recipe)
    print(f"{'preflight':<19} {', '.join(seen)} looked at in {time.monotonic() - started:.2f} s", flush=True)
    for what in unseen:
        print(f"{'preflight':<19} not looked at: {what}", flush=True)


def _check_shards(recipe: Recipe) -> None:
    """As far as the policy's architecture is known here; the rollout pool looks again at what the policy became."""
    checkpoint, shards = recipe.policy.checkpoint, recipe.cluster.rollout.shards
    shape = policy_shape(recipe.policy, recipe.cluster.plan.policy_config)
    if shape is not None:
        config = {
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "intermediate_size": shape.intermediate_size,
        }
        check_tensor_parallel(config, shards, model=checkpoint or shape.source)
    elif checkpoint is not None:
        check_shards_of(checkpoint, shards)


def _checkpoints(recipe: Recipe) -> Iterator[NamedCheckpoint]:
    if recipe.policy.checkpoint is not None:
        yield NamedCheckpoint(setting="policy.checkpoint", checkpoint=recipe.policy.checkpoint, stage="sft")
    if recipe.reward.backbone is not None:
        yield NamedCheckpoint(setting="reward.backbone", checkpoint=recipe.reward.backbone, stage="train_reward_model")
    reference = recipe.alignment.direct.reference_checkpoint
    if reference is not None:
        setting = "alignment.direct.reference_checkpoint"
        yield NamedCheckpoint(setting=setting, checkpoint=reference, stage="align_policy")


def _is_in_a_finished_stage(named: NamedCheckpoint, workspace: str) -> bool:
    *sections, key = named.setting.split(".")
    stages = storage.join(workspace, "stages")
    for directory in storage.list_directories(stages):
        name, _, fingerprint = directory.rpartition("-")
        if name != named.stage:
            continue
        stage = StageDirectory(storage.join(stages, directory), name, fingerprint)
        config = {} if stage.result() is None else stage.manifest().get("config", {})
        for section in sections:
            config = config.get(section, {})
        if config.get(key) == named.checkpoint:
            return True
    return False
