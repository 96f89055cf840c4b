"""Supervised fine-tuning of the policy on DeepSpeed ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config.schema import PreparePolicyConfig, RanksConfig
from pipeline.stages import storage

if TYPE_CHECKING:
    import torch

    from pipeline.learning.supervised_update import SupervisedFineTuner


@dataclass(frozen=True, kw_only=True)
class SupervisedTrainerSpec:
    """All a rank needs to build its trainer."""

    config: PreparePolicyConfig
    ranks: RanksConfig
    policy_uri: str
    """A directory, or a hub name."""
    dtype: str
    seed: int


def build_supervised_trainer(spec: SupervisedTrainerSpec, device: torch.device) -> SupervisedFineTuner:
    """Runs on every rank."""
    from actors.deepspeed_engine import DeepSpeedEngine
    from pipeline.learning.parameter_groups import parameter_groups
    from pipeline.learning.supervised_update import SupervisedFineTuner
    from pipeline.models.backbone import load_causal_lm
    from pipeline.models.critic import Policy
    from pipeline.models.lora import add_lora

    config = spec.config
    with storage.reading(spec.policy_uri) as directory:
        model, tokenizer = load_causal_lm(directory, dtype="float32")
    add_lora(model, config.lora, seed=spec.seed)
    engine = DeepSpeedEngine(
        Policy(model),
        parameter_groups(model, None, config.optimiser, head_learning_rate=config.optimiser.learning_rate),
        betas=config.optimiser.betas,
        max_grad_norm=config.optimiser.max_grad_norm,
        ranks=spec.ranks,
        dtype=spec.dtype,
        device=device,
    )
    return SupervisedFineTuner(
        engine,
        model_config=model.config,
        tokenizer=tokenizer,
        num_steps=config.num_steps,
        warmup_fraction=config.optimiser.warmup_fraction,
        max_tokens_per_micro_batch=config.max_tokens_per_micro_batch,
    )
