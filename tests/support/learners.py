"""Real learners over one-process engines, for the tests of updates and loops."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from types import SimpleNamespace

from pipeline.config.alignment import AlignmentConfig, KLConfig, PPOConfig
from pipeline.config.models import OptimiserConfig
from pipeline.config.reward import PairLossConfig, RewardConfig, VariationalLossConfig, VRMHeadConfig
from pipeline.data.collate import PairCollator, tokenise_pairs
from pipeline.data.planted import OBJECTIVES
from pipeline.data.prompts import tokenise_prompts
from pipeline.data.score_statistics import MixtureStatistics
from pipeline.learning.builders import (
    DirectTrainerSpec,
    PPOLearnerSpec,
    RewardTrainerSpec,
    build_direct_trainer,
    build_ppo_learner,
    build_reward_trainer,
    reference_in_process,
)
from pipeline.learning.direct_data import DirectData, tokenise_examples
from pipeline.learning.engine import TorchEngine
from pipeline.models.backbone import load_backbone, load_causal_lm, load_tokenizer
from pipeline.models.critic import Policy
from pipeline.models.reward_model import RewardModel, RewardModelCard, make_head, save_reward_model
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
    return MixtureStatistics.of(world.train_pairs(), OBJECTIVES)


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
    config = RewardConfig(
        head=head,
        vrm=vrm,
        loss=loss or VariationalLossConfig(),
        pair_loss=pair_loss or PairLossConfig(),
        optimiser=OptimiserConfig(learning_rate=lr, warmup_fraction=0.1),
        head_learning_rate=2 * lr,
        max_length=128,
        max_tokens_per_micro_batch=max_tokens,
        lora=lora,
    )
    spec = RewardTrainerSpec(
        config=config, backbone_uri=tiny_policy, statistics=statistics_of(world), num_steps=num_steps, seed=0
    )
    return build_reward_trainer(spec, make_engine)


def prompts_of(world, tokenizer):
    return tokenise_prompts([(p.id, p.messages) for p in world.train_prompts], tokenizer, max_prompt_tokens=32)


def reference_of(directory):
    """The policy of a directory, frozen, as PPOLearner wants it."""
    policy, _ = load_causal_lm(directory, dtype="float32")
    return reference_in_process("float32", "cpu")(Policy(policy))


def untrained_reward_model(policy, directory):
    """A reward model whose backbone is the policy's decoder: what a separate critic then starts from."""
    backbone = load_backbone(policy, dtype="float32")
    head = make_head("bt", backbone.config.hidden_size, len(OBJECTIVES), HEAD)
    unknown = (0.0,) * len(OBJECTIVES)
    save_reward_model(
        directory,
        state_dict=RewardModel(backbone, head).state_dict(),
        backbone_config=backbone.config.to_dict(),
        tokenizer=load_tokenizer(policy),
        card=reward_card("bt", SimpleNamespace(mean=unknown, std=unknown)),
    )


def ppo_learner(
    tiny_policy,
    world,
    tokenizer,
    publish_directory,
    *,
    config=ALIGNMENT,
    make_engine=TorchEngine,
    dtype="float32",
):
    with TemporaryDirectory() as reward_model:
        if config.ppo.critic_reads_policy_tokens:
            untrained_reward_model(tiny_policy, reward_model)
        probes = choose_probes(prompts_of(world, tokenizer), vocabulary_size=len(tokenizer), seed=0, count=3)
        spec = PPOLearnerSpec(
            config=config,
            policy_uri=tiny_policy,
            reward_model_uri=reward_model,
            dtype=dtype,
            probes=tuple(probes),
            publish_directory=str(publish_directory),
            seed=0,
        )
        return build_ppo_learner(spec, make_engine, reference_in_process(dtype, "cpu"))


def direct_config(algorithm="dpo", **direct):
    """The section of an algorithm, with a learning rate that moves the tiny policy."""
    written = {"optimiser": {"learning_rate": 1e-3, "warmup_fraction": 0.0}, "batch_pairs": 6, "max_length": 128}
    config = {"algorithm": algorithm, "direct": written | direct, "samples_per_prompt": 2}
    return AlignmentConfig.model_validate(config).direct


def direct_trainer(tiny_policy, config, *, make_engine=TorchEngine, max_tokens=512, num_steps=8):
    spec = DirectTrainerSpec(
        config=config,
        policy_uri=tiny_policy,
        dtype="float32",
        num_steps=num_steps,
        max_tokens_per_micro_batch=max_tokens,
        gradient_checkpointing=False,
        seed=0,
    )
    return build_direct_trainer(spec, make_engine)


def direct_data(world, tokenizer, config, *, num_pairs=32):
    examples, heldout = (
        tokenise_examples(pairs, tokenizer, max_length=config.max_length)
        for pairs in (world.train_pairs()[:num_pairs], world.heldout_pairs())
    )
    return DirectData(config=config, examples=examples, trained=range(len(examples)), heldout=heldout, seed=0)
