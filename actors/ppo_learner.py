"""PPO learner shards on DeepSpeed ranks, or the whole learner in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pipeline.config.alignment import AlignmentConfig
from pipeline.config.cluster import RanksConfig
from pipeline.records import PromptGroup
from pipeline.stages import storage

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from pipeline.learning.engine import TrainEngine
    from pipeline.learning.ppo_learner import PPOLearner


@dataclass(frozen=True, kw_only=True)
class PPOLearnerSpec:
    """All a rank needs to build its learner."""

    config: AlignmentConfig
    ranks: RanksConfig
    policy_uri: str
    reward_model_uri: str
    """The critic's backbone starts from this reward model's."""
    dtype: str
    probes: tuple[PromptGroup, ...]
    publish_directory: str
    seed: int


def build_ppo_learner(spec: PPOLearnerSpec, device: torch.device) -> PPOLearner:
    """Runs on every rank."""
    from actors.deepspeed_engine import DeepSpeedEngine, sharded_reference

    return ppo_learner(
        spec,
        partial(DeepSpeedEngine, ranks=spec.ranks, device=device),
        partial(sharded_reference, ranks=spec.ranks, dtype=spec.dtype, device=device),
    )


def ppo_learner(
    spec: PPOLearnerSpec,
    make_engine: Callable[..., TrainEngine],
    make_reference: Callable[[nn.Module], Callable[..., torch.Tensor]],
) -> PPOLearner:
    """The learner of a spec.

    Args:
        make_engine: gets module, parameter groups, betas, max_grad_norm and dtype.
        make_reference: the frozen policy as a function.
    """
    from pipeline.learning.parameter_groups import policy_parameter_groups
    from pipeline.learning.ppo_learner import PPOLearner, reference_without_adapters
    from pipeline.models.backbone import load_causal_lm, train_only_last_layers
    from pipeline.models.critic import Policy, PolicyWithCritic
    from pipeline.models.lora import add_lora

    config, ppo = spec.config, spec.config.ppo
    with storage.reading(spec.policy_uri) as directory:
        policy, tokenizer = load_causal_lm(directory, dtype="float32")
        frozen = load_causal_lm(directory, dtype=spec.dtype)[0] if ppo.lora is None else None
    critic = _critic_backbone(spec) if ppo.critic_reads_policy_tokens else None
    for backbone in (policy, critic):
        if backbone is None:
            continue
        train_only_last_layers(backbone, ppo.trainable_layers)
        add_lora(backbone, ppo.lora, seed=spec.seed)
        if config.gradient_checkpointing:
            backbone.gradient_checkpointing_enable()
    model = PolicyWithCritic(policy, critic)
    model.value_head.requires_grad_(ppo.trains_a_critic)  # without a critic it stays at the zero it starts from
    groups = policy_parameter_groups(model, ppo)
    engine = make_engine(
        model,
        groups,
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


def _critic_backbone(spec: PPOLearnerSpec) -> PreTrainedModel:
    from pipeline.models.reward_model import load_reward_model

    with storage.reading(spec.reward_model_uri) as directory:
        reward_model, _, _ = load_reward_model(directory)
    return reward_model.backbone
