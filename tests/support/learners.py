"""Real learners over one-process engines, for the tests of updates and loops."""

from __future__ import annotations

import torch

from pipeline.config.alignment import AlignmentConfig, KLConfig, PPOConfig
from pipeline.config.models import OptimiserConfig
from pipeline.config.reward import PairLossConfig, VariationalLossConfig, VRMHeadConfig
from pipeline.data.collate import PairCollator, tokenise_pairs
from pipeline.data.planted import OBJECTIVES
from pipeline.data.prompts import tokenise_prompts
from pipeline.data.score_statistics import ScoreStatistics
from pipeline.learning.engine import TorchEngine
from pipeline.learning.parameter_groups import parameter_groups, policy_parameter_groups
from pipeline.learning.ppo_learner import PPOLearner, frozen_reference, reference_without_adapters
from pipeline.learning.reward_trainer import RewardTrainer
from pipeline.learning.schedule import LearningRateSchedule
from pipeline.models.backbone import load_backbone, load_causal_lm
from pipeline.models.critic import Policy, PolicyWithCritic
from pipeline.models.lora import add_lora
from pipeline.models.reward_model import RewardModel, RewardModelCard, make_head
from pipeline.rollouts.numerics_gate import choose_probes

HEAD = VRMHeadConfig(semantic_dims=8, hidden_size=64)
ALIGNMENT = AlignmentConfig(
    num_steps=6,
    prompts_per_step=4,
    samples_per_prompt=2,
    max_prompt_tokens=32,
    max_response_tokens=12,
    kl=KLConfig(coefficient=0.05, target=1.0, horizon=100),
    ppo=PPOConfig(
        epochs=2,
        mini_batch_size=4,
        policy=OptimiserConfig(learning_rate=1e-3),
        critic="value_head",
        critic_learning_rate=1e-3,
    ),
    max_tokens_per_micro_batch=64,
    checkpoint_every=2,
)


def statistics_of(world):
    return ScoreStatistics.of(world.train_pairs(), OBJECTIVES)


def collator(world, tokenizer):
    return PairCollator(statistics=statistics_of(world), temperature=1.0, seed=0)


def tokenised(world, tokenizer, split="train"):
    pairs = world.train_pairs() if split == "train" else world.heldout_pairs()
    return tokenise_pairs(pairs, tokenizer, max_length=128, drop_too_long=True)


def reward_card(head="vrm", statistics=None, vrm=HEAD):
    return RewardModelCard(
        head=head,
        vrm=vrm,
        objectives=OBJECTIVES,
        max_length=128,
        score_mean=statistics.mean,
        score_std=statistics.std,
        reward_mean=0.0,
        reward_std=1.0,
        metrics={},
    )


def reward_trainer(
    tiny_policy,
    world,
    tokenizer,
    *,
    head="vrm",
    vrm=HEAD,
    num_steps=8,
    loss=None,
    pair_loss=None,
    make_engine=TorchEngine,
    max_tokens=512,
    lr=1e-3,
    lora=None,
):
    backbone = load_backbone(tiny_policy, dtype="float32")
    add_lora(backbone, lora, seed=0)
    torch.manual_seed(0)
    module = make_head(head, backbone.config.hidden_size, len(OBJECTIVES), vrm)
    optimiser = OptimiserConfig(learning_rate=lr)
    engine = make_engine(
        RewardModel(backbone, module),
        parameter_groups(backbone, module, optimiser, head_learning_rate=2 * lr),
        betas=optimiser.betas,
        max_grad_norm=1.0,
    )
    statistics = statistics_of(world)
    return RewardTrainer(
        engine,
        card=reward_card(head, statistics, vrm),
        backbone_config=backbone.config,
        tokenizer=tokenizer,
        loss=loss or VariationalLossConfig(),
        pair_loss=pair_loss or PairLossConfig(),
        schedule=LearningRateSchedule(num_steps=num_steps, warmup_fraction=0.1),
        max_tokens_per_micro_batch=max_tokens,
    )


def prompts_of(world, tokenizer):
    return tokenise_prompts([(p.id, p.messages) for p in world.train_prompts], tokenizer, max_prompt_tokens=32)


def reference_of(directory):
    """The policy of a directory, frozen, as PPOLearner wants it."""
    policy, _ = load_causal_lm(directory, dtype="float32")
    frozen = Policy(policy).eval().requires_grad_(False)
    return frozen_reference(frozen, dtype="float32", device=torch.device("cpu"))


def ppo_learner(tiny_policy, world, tokenizer, publish_directory, *, config=ALIGNMENT, make_engine=TorchEngine):
    policy, _ = load_causal_lm(tiny_policy, dtype="float32")
    torch.manual_seed(0)
    separate = config.ppo.trains_a_critic and config.ppo.critic == "separate"
    critic = load_backbone(tiny_policy, dtype="float32") if separate else None
    for backbone in (policy, critic):
        if backbone is not None:
            add_lora(backbone, config.ppo.lora, seed=0)
            if config.gradient_checkpointing:
                backbone.gradient_checkpointing_enable()
    model = PolicyWithCritic(policy, critic)
    model.value_head.requires_grad_(config.ppo.trains_a_critic)
    groups = policy_parameter_groups(model, config.ppo)
    engine = make_engine(model, groups, betas=(0.9, 0.95), max_grad_norm=1.0)
    return PPOLearner(
        engine,
        reference_of(tiny_policy) if config.ppo.lora is None else reference_without_adapters(engine),
        config=config,
        model_config=policy.config,
        tokenizer=tokenizer,
        probes=choose_probes(prompts_of(world, tokenizer), vocabulary_size=len(tokenizer), seed=0, count=3),
        publish_directory=str(publish_directory),
        seed=0,
    )
