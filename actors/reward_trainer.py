"""Reward-model training, on DeepSpeed ranks or in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pipeline.config.cluster import RanksConfig
from pipeline.config.reward import RewardConfig
from pipeline.data.score_statistics import ScoreStatistics
from pipeline.stages import storage

if TYPE_CHECKING:
    import torch

    from pipeline.learning.engine import TrainEngine
    from pipeline.learning.reward_trainer import RewardTrainer


@dataclass(frozen=True, kw_only=True)
class RewardTrainerSpec:
    """All a rank needs to build its trainer."""

    config: RewardConfig
    ranks: RanksConfig
    backbone_uri: str
    """A directory, or a hub name."""
    statistics: ScoreStatistics
    num_steps: int
    seed: int


def build_reward_trainer(spec: RewardTrainerSpec, device: torch.device) -> RewardTrainer:
    """Runs on every rank."""
    from actors.deepspeed_engine import DeepSpeedEngine

    return reward_trainer(spec, partial(DeepSpeedEngine, ranks=spec.ranks, device=device))


def reward_trainer(spec: RewardTrainerSpec, make_engine: Callable[..., TrainEngine]) -> RewardTrainer:
    """The trainer of a spec; `make_engine` gets module, parameter groups, betas, max_grad_norm and dtype."""
    import torch

    from pipeline.learning.parameter_groups import parameter_groups
    from pipeline.learning.reward_trainer import RewardTrainer
    from pipeline.learning.schedule import LearningRateSchedule
    from pipeline.models.backbone import load_backbone, load_tokenizer, train_only_last_layers
    from pipeline.models.lora import add_lora
    from pipeline.models.reward_model import RewardModel, RewardModelCard, make_head

    config = spec.config
    with storage.reading(spec.backbone_uri) as directory:
        backbone = load_backbone(directory, dtype="float32")
        tokenizer = load_tokenizer(directory)
    train_only_last_layers(backbone, config.trainable_layers)
    add_lora(backbone, config.lora, seed=spec.seed)
    if config.gradient_checkpointing:
        backbone.gradient_checkpointing_enable()
    torch.manual_seed(spec.seed)
    head = make_head(
        config.head,
        backbone.config.hidden_size,
        len(spec.statistics.objectives),
        config.vrm,
        reward_weights=config.reward_weights,
        ensemble=config.ensemble,
    )
    model = RewardModel(backbone, head)
    engine = make_engine(
        model,
        parameter_groups(backbone, head, config.optimiser, head_learning_rate=config.head_learning_rate),
        betas=config.optimiser.betas,
        max_grad_norm=config.optimiser.max_grad_norm,
        dtype=config.backbone_dtype,
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
        reward_weights=config.reward_weights,
        ensemble=config.ensemble,
    )
    return RewardTrainer(
        engine,
        card=card,
        backbone_config=backbone.config,
        tokenizer=tokenizer,
        loss=config.loss,
        pair_loss=config.pair_loss,
        schedule=LearningRateSchedule(num_steps=spec.num_steps, warmup_fraction=config.optimiser.warmup_fraction),
        max_tokens_per_micro_batch=config.max_tokens_per_micro_batch,
    )
