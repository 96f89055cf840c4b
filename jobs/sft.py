"""Stage 1: the policy before alignment, a checkpoint as it is, or fine-tuned, or made from scratch.

python jobs/sft.py --recipe tiny
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

from actors.sft_trainer import SFTTrainerSpec, build_sft_trainer
from jobs.run_job import run_job
from pipeline.config.recipe import Recipe
from pipeline.data.batching import step_indices
from pipeline.data.run_data import data_fingerprints
from pipeline.errors import DataError
from pipeline.loops.training import train
from pipeline.records import Metrics, PromptGroup, StageResult
from pipeline.stages import storage
from pipeline.stages.workspace import StageDirectory

if TYPE_CHECKING:
    from jobs.job_context import JobContext

VERSION = 2
HELDOUT_TEXTS = 256
"""At most; of few texts a tenth."""


def sft(job: JobContext) -> StageResult:
    recipe = job.recipe
    is_tuned = recipe.sft.num_steps > 0
    # Which text of a row is imitated depends on the objectives: with raw ratings it is the one they rate best.
    read = {"seed", "data", "policy", "sft"} | ({"objectives"} if is_tuned else set())
    return job.stages.run(
        "sft",
        VERSION,
        lambda stage: _fine_tune(stage, job) if is_tuned else _adopt(stage, recipe),
        config=recipe.model_dump(mode="json", include=read),
        data=data_fingerprints(recipe) if is_tuned else [],
        max_restarts=recipe.cluster.sft.max_restarts,
    )


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


def _adopt(stage: StageDirectory, recipe: Recipe) -> Metrics:
    """Uses the checkpoint as it is; it is copied, so that the workspace does not depend on the hub."""
    from pipeline.learning.starting_policy import write_starting_policy

    with storage.writing(stage.result_uri) as directory:
        write_starting_policy(recipe.policy, directory, seed=recipe.seed)
    return {}


def _fine_tune(stage: StageDirectory, job: JobContext) -> Metrics:
    from actors.rank_group import RankGroup
    from actors.ranked_learner import RankedLearner
    from pipeline.data.collate import tokenise_texts
    from pipeline.learning.starting_policy import write_starting_policy
    from pipeline.models.backbone import require_lora_targets

    recipe, config = job.recipe, job.recipe.sft
    ranks, deadlines = recipe.cluster.sft, recipe.cluster.deadlines
    data = job.data
    with tempfile.TemporaryDirectory() as start:
        tokenizer = write_starting_policy(recipe.policy, start, seed=recipe.seed)
        require_lora_targets(start, config.lora, "sft")
        texts = tokenise_texts(data.sft_texts, tokenizer, max_length=config.max_length)
        heldout, texts = split_texts(texts)
        spec = SFTTrainerSpec(config=config, ranks=ranks, policy_uri=start, dtype=recipe.policy.dtype, seed=recipe.seed)
        with RankGroup("policy training", ranks, start_s=deadlines.start_s) as group:
            group.build(build_sft_trainer, spec)
            learner = RankedLearner(group, deadlines)
            metrics = train(
                learner,
                stage,
                batch_of=lambda step: [
                    texts[i] for i in step_indices(len(texts), config.batch_size, step, recipe.seed)
                ],
                heldout=heldout,
                num_steps=config.num_steps,
                eval_every=config.eval_every,
                checkpoint_every=config.checkpoint_every,
            )
            return metrics | learner.peak_memory()


if __name__ == "__main__":
    run_job(__doc__, sft)
