"""What a rank of each stage holds and computes, read from the recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.planning.decoder_shape import DecoderShape, backbone_shape, policy_shape
from cluster.planning.memory import TrainedDecoder, TrainingLoad
from pipeline.config.cluster import RanksConfig
from pipeline.config.models import LoRAConfig
from pipeline.config.recipe import Recipe
from pipeline.config.reward import RewardConfig
from pipeline.models.sequence_parallel_check import check_sequence_parallel


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The decoders of a recipe."""

    policy: DecoderShape
    backbone: DecoderShape
    """Of the reward model, and of a critic of its own."""


def shapes_of(recipe: Recipe) -> Shapes | None:
    """None where nothing on this machine knows one of the architectures."""
    policy, backbone = _known_shapes(recipe)
    if policy is None or backbone is None:
        return None
    return Shapes(policy=policy, backbone=backbone.with_layers(recipe.reward.backbone_layers))


def _known_shapes(recipe: Recipe) -> tuple[DecoderShape | None, DecoderShape | None]:
    """Policy and backbone."""
    plan = recipe.cluster.plan
    policy = policy_shape(recipe.policy, plan.policy_config)
    if recipe.reward.backbone is None and plan.backbone_config is None:
        return policy, policy
    return policy, backbone_shape(recipe.reward.backbone or "", plan.backbone_config)


def check_sequence_groups(recipe: Recipe) -> None:
    """Refuses sequence groups that do not divide the heads of what they train, as far as this machine knows them.

    The ranks look again at the models that they load.

    Raises:
        ConfigError: as `check_sequence_parallel`.
    """
    cluster, alignment = recipe.cluster, recipe.alignment
    if cluster.sft.sequence_parallel == cluster.reward.sequence_parallel == cluster.alignment.sequence_parallel == 1:
        return
    policy, backbone = _known_shapes(recipe)
    has_critic = not alignment.is_direct and alignment.ppo.critic_reads_policy_tokens
    for section, ranks, trained in (
        ("sft", cluster.sft, [policy] if recipe.sft.num_steps else []),
        ("reward", cluster.reward, [backbone] if recipe.scores_by_reward_model else []),
        ("alignment", cluster.alignment, [policy, backbone] if has_critic else [policy]),
    ):
        for shape in trained:
            if shape is not None:
                setting = f"cluster.{section}.sequence_parallel"
                check_sequence_parallel(ranks.sequence_parallel, shape.num_heads, model=shape.source, setting=setting)


def unknown_checkpoint(recipe: Recipe) -> str:
    """The sentence for a recipe whose shapes are not known."""
    plan = recipe.cluster.plan
    of_policy = policy_shape(recipe.policy, plan.policy_config) is None
    checkpoint = recipe.policy.checkpoint if of_policy else recipe.reward.backbone
    setting = "policy_config" if of_policy else "backbone_config"
    return (
        f"Memory and time are not planned: this machine has no config.json of {checkpoint} whose family the plan "
        f"knows. Set cluster.plan.{setting} to one."
    )


def sft_load(recipe: Recipe, shapes: Shapes) -> TrainingLoad:
    sft = recipe.sft
    decoder = _decoder(shapes.policy, has_language_head=True, trainable_layers=None, lora=sft.lora)
    tokens, count = _micro_batches(sft.batch_size, sft.max_length, sft.max_tokens_per_micro_batch, recipe.cluster.sft)
    return TrainingLoad(
        decoders=(decoder,),
        head_parameters=0,
        reference=None,
        dtype=recipe.policy.dtype,
        recompute=False,
        micro_batch_tokens=tokens,
        micro_batches=count,
    )


def reward_load(recipe: Recipe, shapes: Shapes, *, dtype: str) -> TrainingLoad:
    """A pair is a prompt with two responses: up to 2 max_length tokens.

    Args:
        dtype: of the backbone, `auto` resolved.
    """
    reward = recipe.reward
    decoder = _decoder(
        shapes.backbone, has_language_head=False, trainable_layers=reward.trainable_layers, lora=reward.lora
    )
    tokens, count = _micro_batches(
        reward.batch_pairs, 2 * reward.max_length, reward.max_tokens_per_micro_batch, recipe.cluster.reward
    )
    return TrainingLoad(
        decoders=(decoder,),
        head_parameters=_head_parameters(reward, shapes.backbone.hidden_size, len(recipe.objectives)),
        reference=None,
        dtype=dtype,
        recompute=reward.gradient_checkpointing,
        micro_batch_tokens=tokens,
        micro_batches=count,
    )


def alignment_load(recipe: Recipe, shapes: Shapes) -> TrainingLoad:
    alignment, ranks = recipe.alignment, recipe.cluster.alignment
    if alignment.is_direct:
        direct = alignment.direct
        rows, longest, lora, layers = direct.batch_pairs, 2 * direct.max_length, direct.lora, direct.trainable_layers
        # The reference's log-probabilities are computed before, and the reference is gone.
        reference, separate_critic = None, False
    else:
        ppo = alignment.ppo
        rows, longest = ppo.mini_batch_size, alignment.max_prompt_tokens + alignment.max_response_tokens
        lora, layers = ppo.lora, ppo.trainable_layers
        reference, separate_critic = None if ppo.lora else shapes.policy, ppo.critic_reads_policy_tokens
    decoders = [_decoder(shapes.policy, has_language_head=True, trainable_layers=layers, lora=lora)]
    if separate_critic:
        decoders.append(_decoder(shapes.backbone, has_language_head=False, trainable_layers=layers, lora=lora))
    tokens, count = _micro_batches(rows, longest, alignment.max_tokens_per_micro_batch, ranks)
    return TrainingLoad(
        decoders=tuple(decoders),
        head_parameters=0 if alignment.is_direct else decoders[-1].shape.hidden_size + 1,
        reference=reference,
        dtype=recipe.policy.dtype,
        recompute=alignment.gradient_checkpointing,
        micro_batch_tokens=tokens,
        micro_batches=count,
    )


def _decoder(
    shape: DecoderShape, *, has_language_head: bool, trainable_layers: int | None, lora: LoRAConfig | None
) -> TrainedDecoder:
    return TrainedDecoder(
        shape=shape,
        has_language_head=has_language_head,
        trainable_layers=trainable_layers,
        adapter_parameters=0 if lora is None else shape.lora_parameters(lora),
    )


def _micro_batches(rows: int, longest: int, budget: int, ranks: RanksConfig) -> tuple[float, float]:
    """Tokens of a rank's largest micro-batch and the micro-batches of an optimiser step, all rows at their longest.

    A row longer than the budget has a micro-batch of its own (`plan_micro_batches`). n ranks that share rows have n
    budgets together, and each has an n-th of the tokens.
    """
    n = ranks.sequence_parallel
    shared_tokens = math.ceil(rows / ranks.row_groups) * longest
    tokens = float(min(shared_tokens, max(n * budget, longest)))
    return tokens / n, math.ceil(shared_tokens / tokens)


def _head_parameters(reward: RewardConfig, hidden: int, objectives: int) -> int:
    """Of the reward head (`pipeline/models/reward_heads.py`); small beside any decoder but a tiny one."""
    if reward.head not in ("vrm", "gate"):
        return hidden * (reward.ensemble.members if reward.head == "ensemble" else 1 + objectives)
    vrm = reward.vrm
    weights = (hidden + 1) * vrm.hidden_size + (vrm.hidden_size + 1) * (objectives + 1)
    features = (hidden + 1) * vrm.hidden_size + (vrm.hidden_size + 1) * 2 * vrm.semantic_dims
    return weights + features + objectives * vrm.semantic_dims
