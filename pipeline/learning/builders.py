"""Learners from their specifications. The caller chooses the engine, so the same builder serves one process and ranks.

`make_engine` is called as `TorchEngine`: module and parameter groups, then betas, max_grad_norm and dtype by name.
`shards` are the ranks among which the models are split while they are loaded; None loads them whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.config.alignment import AlignmentConfig
from pipeline.config.direct_alignment import DirectConfig
from pipeline.config.reward import RewardConfig
from pipeline.config.sft import SFTConfig
from pipeline.data.score_statistics import MixtureStatistics
from pipeline.learning.direct_trainer import DirectAlignmentTrainer
from pipeline.learning.engine import TorchEngine, TrainEngine
from pipeline.learning.parameter_groups import parameter_groups, policy_parameter_groups
from pipeline.learning.ppo_learner import PPOLearner, frozen_reference, reference_without_adapters
from pipeline.learning.reward_trainer import RewardTrainer
from pipeline.learning.schedule import LearningRateSchedule
from pipeline.learning.sft_trainer import SFTTrainer
from pipeline.models.backbone import (
    load_backbone,
    load_causal_lm,
    load_tokenizer,
    train_only_last_layers,
)
from pipeline.models.critic import Policy, PolicyWithCritic, ResponsePolicy
from pipeline.models.frozen_states import FrozenStates
from pipeline.models.lora import add_lora
from pipeline.models.reward_heads import RewardHead
from pipeline.models.reward_model import RewardModel, load_reward_backbone, make_head
from pipeline.models.reward_model_card import RewardCalibration, RewardModelCard, SourceScale
from pipeline.models.sharded_loading import Shards
from pipeline.records import PromptGroup
from pipeline.stages import storage

MakeEngine = Callable[..., TrainEngine]
MakeReference = Callable[[nn.Module], Callable[..., torch.Tensor]]

# ------------------------------------------------------------------ supervised fine-tuning


@dataclass(frozen=True, kw_only=True)
class SFTTrainerSpec:
    config: SFTConfig
    policy_uri: str
    """A directory, or a hub name."""
    dtype: str
    seed: int


def build_sft_trainer(spec: SFTTrainerSpec, make_engine: MakeEngine, shards: Shards | None = None) -> SFTTrainer:
    config = spec.config
    with storage.reading(spec.policy_uri) as directory:
        model, tokenizer = load_causal_lm(directory, dtype="float32", shards=shards)
    add_lora(model, config.lora, seed=spec.seed)
    engine = make_engine(
        Policy(model),
        parameter_groups(model, None, config.optimiser, head_learning_rate=config.optimiser.learning_rate),
        betas=config.optimiser.betas,
        max_grad_norm=config.optimiser.max_grad_norm,
        dtype=spec.dtype,
    )
    return SFTTrainer(
        engine,
        model_config=model.config,
        tokenizer=tokenizer,
        num_steps=config.num_steps,
        warmup_fraction=config.optimiser.warmup_fraction,
        max_tokens_per_micro_batch=config.max_tokens_per_micro_batch,
    )


# ------------------------------------------------------------------ the reward model


@dataclass(frozen=True, kw_only=True)
class RewardTrainerSpec:
    config: RewardConfig
    backbone_uri: str
    """A directory, or a hub name."""
    statistics: MixtureStatistics
    num_steps: int
    seed: int
    states_uri: str | None = None
    """Where the states of a backbone that does not train are kept; None computes them as they are needed."""


def build_reward_trainer(
    spec: RewardTrainerSpec, make_engine: MakeEngine, shards: Shards | None = None
) -> RewardTrainer:
    config = spec.config
    with storage.reading(spec.backbone_uri) as directory:
        backbone = load_backbone(directory, dtype="float32", num_layers=config.backbone_layers, shards=shards)
        tokenizer = load_tokenizer(directory)
    train_only_last_layers(backbone, config.trainable_layers)
    add_lora(backbone, config.lora, seed=spec.seed)
    if config.gradient_checkpointing:
        backbone.gradient_checkpointing_enable()
    head = _new_head(spec, backbone.config.hidden_size)
    model = RewardModel(backbone, head, config.pooling)
    if spec.states_uri is not None:
        model.frozen_states = FrozenStates.read(spec.states_uri)
    engine = make_engine(
        model,
        parameter_groups(backbone, head, config.optimiser, head_learning_rate=config.head_learning_rate),
        betas=config.optimiser.betas,
        max_grad_norm=config.optimiser.max_grad_norm,
        dtype=config.backbone_dtype,
    )
    return RewardTrainer(
        engine,
        card=_card_before_training(spec),
        backbone_config=backbone.config,
        tokenizer=tokenizer,
        loss=config.loss,
        pair_loss=config.pair_loss,
        schedule=LearningRateSchedule(num_steps=spec.num_steps, warmup_fraction=config.optimiser.warmup_fraction),
        max_tokens_per_micro_batch=config.max_tokens_per_micro_batch,
    )


def _new_head(spec: RewardTrainerSpec, hidden_size: int) -> RewardHead:
    torch.manual_seed(spec.seed)
    return make_head(
        spec.config.head,
        hidden_size,
        len(spec.statistics.objectives),
        spec.config.vrm,
        reward_weights=spec.config.reward_weights,
        ensemble=spec.config.ensemble,
    )


def _card_before_training(spec: RewardTrainerSpec) -> RewardModelCard:
    """The trainer writes the scale of the rewards and the metrics into the card that it exports."""
    return RewardModelCard(
        head=spec.config.head,
        vrm=spec.config.vrm,
        objectives=spec.statistics.objectives,
        max_length=spec.config.max_length,
        score_mean=spec.statistics.mean,
        score_std=spec.statistics.std,
        score_scale_of=spec.statistics.scale_sources,
        score_statistics={
            name: SourceScale(mean=source.mean, std=source.std, count=source.count)
            for name, source in spec.statistics.sources.items()
        },
        reward_mean=0.0,
        reward_std=1.0,
        metrics={},
        reward_weights=spec.config.reward_weights,
        ensemble=spec.config.ensemble,
        calibration=RewardCalibration(answer_error=spec.config.answer_error),
        pooling=spec.config.pooling,
    )


# ------------------------------------------------------------------ the policy


@dataclass(frozen=True, kw_only=True)
class PPOLearnerSpec:
    config: AlignmentConfig
    policy_uri: str
    reward_model_uri: str | None
    """A separate critic starts from the backbone of this reward model; None takes the policy's own decoder."""
    dtype: str
    probes: tuple[PromptGroup, ...]
    """Probes of the numerics gate."""
    publish_directory: str
    seed: int


def build_ppo_learner(
    spec: PPOLearnerSpec, make_engine: MakeEngine, make_reference: MakeReference, shards: Shards | None = None
) -> PPOLearner:
    """The learner of a PPO alignment: policy, reference policy and, where the algorithm has one, critic.

    Args:
        make_reference: turns the frozen policy into a function; not called where adapters train.
    """
    config, ppo = spec.config, spec.config.ppo
    with storage.reading(spec.policy_uri) as directory:
        policy, tokenizer = load_causal_lm(directory, dtype="float32", shards=shards)
        frozen = load_causal_lm(directory, dtype=spec.dtype, shards=shards)[0] if ppo.lora is None else None
    critic = _critic_backbone(spec, shards) if ppo.critic_reads_policy_tokens else None
    for backbone in (policy, critic):
        if backbone is None:
            continue
        train_only_last_layers(backbone, ppo.trainable_layers)
        add_lora(backbone, ppo.lora, seed=spec.seed)
        if config.gradient_checkpointing:
            backbone.gradient_checkpointing_enable()
    model = PolicyWithCritic(policy, critic)
    model.value_head.requires_grad_(ppo.trains_a_critic)  # without a critic it stays at the zero it starts from
    engine = make_engine(
        model,
        policy_parameter_groups(model, ppo),
        betas=ppo.policy.betas,
        max_grad_norm=ppo.policy.max_grad_norm,
        dtype=spec.dtype,
    )
    reference = reference_without_adapters(engine) if frozen is None else make_reference(Policy(frozen))
    return PPOLearner(
        engine,
        reference,
        config=config,
        model_config=policy.config,
        tokenizer=tokenizer,
        probes=spec.probes,
        publish_directory=spec.publish_directory,
        seed=spec.seed,
    )


def _critic_backbone(spec: PPOLearnerSpec, shards: Shards | None) -> PreTrainedModel:
    if spec.reward_model_uri is None:
        with storage.reading(spec.policy_uri) as directory:
            return load_backbone(directory, dtype="float32", shards=shards)
    with storage.reading(spec.reward_model_uri) as directory:
        return load_reward_backbone(directory, shards=shards)


# ------------------------------------------------------------------ direct alignment


@dataclass(frozen=True, kw_only=True)
class DirectTrainerSpec:
    config: DirectConfig
    policy_uri: str
    """A directory, or a hub name."""
    dtype: str
    num_steps: int
    max_tokens_per_micro_batch: int
    gradient_checkpointing: bool
    seed: int


def build_direct_trainer(
    spec: DirectTrainerSpec, make_engine: MakeEngine, shards: Shards | None = None
) -> DirectAlignmentTrainer:
    config = spec.config
    with storage.reading(spec.policy_uri) as directory:
        policy, tokenizer = load_causal_lm(directory, dtype="float32", shards=shards)
    train_only_last_layers(policy, config.trainable_layers)
    add_lora(policy, config.lora, seed=spec.seed)
    if spec.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    engine = make_engine(
        ResponsePolicy(policy),
        parameter_groups(policy, None, config.optimiser, head_learning_rate=config.optimiser.learning_rate),
        betas=config.optimiser.betas,
        max_grad_norm=config.optimiser.max_grad_norm,
        dtype=spec.dtype,
    )
    return DirectAlignmentTrainer(
        engine,
        config=config,
        model_config=policy.config,
        tokenizer=tokenizer,
        schedule=LearningRateSchedule(num_steps=spec.num_steps, warmup_fraction=config.optimiser.warmup_fraction),
        max_tokens_per_micro_batch=spec.max_tokens_per_micro_batch,
    )


# ------------------------------------------------------------------ in one process


def engine_in_process(device: str) -> MakeEngine:
    return partial(TorchEngine, device=device)


def reference_in_process(dtype: str, device: str) -> MakeReference:
    def reference(policy: nn.Module) -> Callable[..., Any]:
        frozen = policy.eval().requires_grad_(False).to(device)
        return frozen_reference(frozen, dtype=dtype, device=torch.device(device))

    return reference
