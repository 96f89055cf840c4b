"""Stage 1: the policy before alignment, a checkpoint as it is, or fine-tuned, or made from scratch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from pipeline.config.recipe import ExperimentConfig
from pipeline.data.batching import step_indices
from pipeline.data.collate import tokenise_texts
from pipeline.data.run_data import RunData, data_fingerprints
from pipeline.errors import DataError
from pipeline.learning.builders import SFTTrainerSpec
from pipeline.learning.starting_policy import write_starting_policy
from pipeline.loops.training import train
from pipeline.models.backbone import require_lora_targets
from pipeline.ports import Learner
from pipeline.records import Metrics, PromptGroup
from pipeline.stages import storage
from pipeline.stages.stage_spec import StageSpec
from pipeline.stages.workspace import StageDirectory

VERSION = 3
STARTING_POLICY = "starting_policy"
"""Directory of the stage that holds, while it trains, the policy that it starts from."""
HELDOUT_TEXTS = 256
"""Texts held out at most; of few texts, a tenth is held out."""

OpenSFTTrainer = Callable[[SFTTrainerSpec], AbstractContextManager[Learner[Sequence[PromptGroup]]]]


def sft_stage(experiment: ExperimentConfig) -> StageSpec:
    is_tuned = experiment.sft.num_steps > 0
    # Which text of a row is imitated depends on the objectives: with raw ratings it is the one they rate best.
    read = {"seed", "data", "policy", "sft"} | ({"objectives"} if is_tuned else set())
    return StageSpec(
        name="sft",
        version=VERSION,
        config=experiment.model_dump(mode="json", include=read),
        data=tuple(data_fingerprints(experiment)) if is_tuned else (),
    )


def run_sft(
    stage: StageDirectory, experiment: ExperimentConfig, read_data: Callable[[], RunData], open_trainer: OpenSFTTrainer
) -> Metrics:
    """Writes the policy before alignment to the stage's result: the checkpoint as it is, or fine-tuned.

    Args:
        read_data: not called where the checkpoint is used as it is.
        open_trainer: opens the trainer of a specification, in this process or on Ray actors.

    Raises:
        ConfigError: adapters on layers that the model does not have.
        DataError: too few texts, or none that fits.
        CheckpointError: the checkpoint cannot be loaded.
    """
    if experiment.sft.num_steps == 0:
        # A copy: the workspace does not depend on the hub.
        with storage.writing(stage.result_uri) as directory:
            write_starting_policy(experiment.policy, directory, seed=experiment.seed)
        return {}
    # In the workspace: a rank on another node reads it there.
    start = storage.join(stage.uri, STARTING_POLICY)
    try:
        return _fine_tune(stage, experiment, read_data(), open_trainer, start)
    finally:
        storage.delete_directory(start)


def _fine_tune(
    stage: StageDirectory, experiment: ExperimentConfig, data: RunData, open_trainer: OpenSFTTrainer, start: str
) -> Metrics:
    config, seed = experiment.sft, experiment.seed
    for note in data.source_notes:
        print(f"{stage.name}  {note}", flush=True)
    with storage.writing(start) as directory:
        tokenizer = write_starting_policy(experiment.policy, directory, seed=seed)
        require_lora_targets(directory, config.lora, "sft")
    fitting = tokenise_texts(
        data.sft_texts, tokenizer, max_length=config.max_length, max_too_long=experiment.data.max_too_long
    )
    print(f"{stage.name}  {len(fitting)} of {len(data.sft_texts)} texts fit in {config.max_length} tokens", flush=True)
    heldout, texts = split_texts(fitting)
    spec = SFTTrainerSpec(config=config, policy_uri=start, dtype=experiment.policy.dtype, seed=seed)
    with open_trainer(spec) as trainer:
        metrics = train(
            trainer,
            stage,
            batch_of=lambda step: [texts[i] for i in step_indices(len(texts), config.batch_size, step, seed)],
            heldout=heldout,
            num_steps=config.num_steps,
            eval_every=config.eval_every,
            checkpoint_every=config.checkpoint_every,
        )
        return metrics | trainer.peak_memory()


def split_texts(texts: list[PromptGroup]) -> tuple[list[PromptGroup], list[PromptGroup]]:
    """Held out, and to train on.

    Raises:
        DataError: not one for each.
    """
    heldout = min(HELDOUT_TEXTS, max(1, len(texts) // 10))
    if len(texts) < 2:
        raise DataError(
            f"{len(texts)} text to fine-tune on, but one to train on and one to hold out are the least. Give more "
            "data, or take the policy as it is (sft.num_steps=0)."
        )
    return texts[:heldout], texts[heldout:]
