"""Reward-model training on DeepSpeed ranks."""

from __future__ import annotations

from dataclasses import dataclass

import ray

from actors.rank_group import RankGroup
from pipeline.config.schema import DeadlinesConfig, RanksConfig, RewardTrainingConfig
from pipeline.data.score_statistics import ScoreStatistics
from pipeline.records import Metrics, PreferenceBatch
from pipeline.stages import storage


@dataclass(frozen=True, kw_only=True)
class RewardTrainerSpec:
    """All a rank needs to build its trainer."""

    config: RewardTrainingConfig
    ranks: RanksConfig
    backbone_uri: str
    statistics: ScoreStatistics
    num_steps: int
    seed: int


def build_reward_trainer(spec: RewardTrainerSpec, device):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Runs on every rank."""
    import torch

    from actors.deepspeed_engine import DeepSpeedEngine
    from pipeline.learning.parameter_groups import parameter_groups
    from pipeline.learning.reward_update import RewardModelTrainer
    from pipeline.models.backbone import load_backbone, load_tokenizer, train_only_last_layers
    from pipeline.models.reward_model import RewardModel, RewardModelCard, make_head

    config = spec.config
    with storage.reading(spec.backbone_uri) as directory:
        backbone = load_backbone(directory, dtype="float32")
        tokenizer = load_tokenizer(directory)
    train_only_last_layers(backbone, config.trainable_layers)
    if config.gradient_checkpointing:
        backbone.gradient_checkpointing_enable()
    torch.manual_seed(spec.seed)
    head = make_head(config.head, backbone.config.hidden_size, len(spec.statistics.objectives), config.vrm)
    model = RewardModel(backbone, head)
    engine = DeepSpeedEngine(
        model,
        parameter_groups(backbone, head, config.optimiser, head_learning_rate=config.head_learning_rate),
        betas=config.optimiser.betas,
        max_grad_norm=config.optimiser.max_grad_norm,
        ranks=spec.ranks,
        dtype=config.backbone_dtype,
        device=device,
    )
    card = RewardModelCard(
        head=config.head,
        vrm=config.vrm,
        objectives=spec.statistics.objectives,
        max_length=config.max_length,
        score_mean=spec.statistics.mean,
        score_std=spec.statistics.std,
        reward_mean=0.0,
        reward_std=1.0,
        metrics={},
    )
    return RewardModelTrainer(
        engine,
        card=card,
        statistics=spec.statistics,
        backbone_config=backbone.config,
        tokenizer=tokenizer,
        loss=config.loss,
        num_steps=spec.num_steps,
        warmup_fraction=config.optimiser.warmup_fraction,
        max_tokens_per_micro_batch=config.max_tokens_per_micro_batch,
    )


class RankedLearner:
    """A group of ranks as one `Learner`: every rank gets the whole batch and takes its share."""

    def __init__(self, group: RankGroup, deadlines: DeadlinesConfig) -> None:
        self._group = group
        self._update_s = deadlines.update_s

    def restore(self, checkpoint: str) -> None:
        self._all(lambda rank: rank.restore.remote(checkpoint), f"restoring {checkpoint}")

    def update(self, batch: PreferenceBatch, step: int) -> Metrics:
        reference = ray.put(batch)
        return self._all(lambda rank: rank.update.remote(reference, step), f"updating at step {step}")

    def evaluate(self, batch: PreferenceBatch) -> Metrics:
        reference = ray.put(batch)
        return self._all(lambda rank: rank.evaluate.remote(reference), "evaluating")

    def save(self, directory: str) -> None:
        self._all(lambda rank: rank.save.remote(directory), f"saving {directory}")

    def export(self, directory: str) -> None:
        self._all(lambda rank: rank.export.remote(directory), f"exporting to {directory}")

    def _all(self, call, doing):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        return self._group.all(call, doing=doing, deadline_s=self._update_s)[0]
