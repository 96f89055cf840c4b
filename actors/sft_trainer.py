"""Supervised fine-tuning of the policy, on DeepSpeed ranks or in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pipeline.config.cluster import RanksConfig
from pipeline.config.sft import SFTConfig
from pipeline.stages import storage

if TYPE_CHECKING:
    import torch

    from pipeline.learning.engine import TrainEngine
    from pipeline.learning.sft_trainer import SFTTrainer


@dataclass(frozen=True, kw_only=True)
class SFTTrainerSpec:
    """All a rank needs to build its trainer."""

    config: SFTConfig
    ranks: RanksConfig
    policy_uri: str
    """A directory, or a hub name."""
    dtype: str
    seed: int


def build_sft_trainer(spec: SFTTrainerSpec, device: torch.device) -> SFTTrainer:
    """Runs on every rank."""
    from actors.deepspeed_engine import DeepSpeedEngine

    return sft_trainer(spec, partial(DeepSpeedEngine, ranks=spec.ranks, device=device))


def sft_trainer(spec: SFTTrainerSpec, make_engine: Callable[..., TrainEngine]) -> SFTTrainer:
    """The trainer of a spec; `make_engine` gets module, parameter groups, betas, max_grad_norm and dtype."""
    from pipeline.learning.parameter_groups import parameter_groups
    from pipeline.learning.sft_trainer import SFTTrainer
    from pipeline.models.backbone import load_causal_lm
    from pipeline.models.critic import Policy
    from pipeline.models.lora import add_lora

    config = spec.config
    with storage.reading(spec.policy_uri) as directory:
        model, tokenizer = load_causal_lm(directory, dtype="float32")
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
