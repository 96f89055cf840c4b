"""What a rank builds its learner from: the policy of one checkpoint, the critic of another."""

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.reward import RewardConfig
from pipeline.learning.builders import (
    PPOLearnerSpec,
    RewardTrainerSpec,
    build_ppo_learner,
    build_reward_trainer,
    reference_in_process,
)
from pipeline.learning.engine import TorchEngine
from tests.support.learners import ALIGNMENT, HEAD, statistics_of


def built(policy, reward_model, critic, *, recomputed=False):
    ppo = ALIGNMENT.ppo.model_copy(update={"critic": critic})
    spec = PPOLearnerSpec(
        config=ALIGNMENT.model_copy(update={"ppo": ppo, "gradient_checkpointing": recomputed}),
        policy_uri=policy,
        reward_model_uri=reward_model,
        dtype="float32",
        probes=(),
        publish_directory="",
        seed=0,
    )
    return build_ppo_learner(spec, TorchEngine, reference_in_process("float32", "cpu"))


def test_a_separate_critic_starts_from_the_reward_models_backbone(tiny_policy, trained_reward_model):
    model = built(tiny_policy, trained_reward_model, "separate").engine.module
    policy = load_file(f"{tiny_policy}/model.safetensors")
    reward_model = load_file(f"{trained_reward_model}/model.safetensors")
    critic = model.critic.state_dict()
    assert {f"backbone.{name}" for name in critic} == {name for name in reward_model if name.startswith("backbone.")}
    for name, tensor in critic.items():
        assert torch.equal(tensor, reward_model[f"backbone.{name}"]), name
    # The reward model was trained on top of this very policy, and has left it.
    assert not torch.equal(critic["embed_tokens.weight"], policy["model.embed_tokens.weight"])
    for name, tensor in policy.items():
        assert torch.equal(model.policy.state_dict()[name], tensor), name
    assert model.value_head.weight.abs().max() == 0.0


def test_a_value_head_reads_the_policy_and_no_reward_model(tiny_policy):
    assert built(tiny_policy, "/nowhere", "value_head").engine.module.critic is None


@pytest.mark.parametrize("recomputed", [False, True])
def test_activations_are_recomputed_in_every_trained_backbone_where_the_recipe_says_so(
    recomputed, tiny_policy, trained_reward_model, world
):
    aligned = built(tiny_policy, trained_reward_model, "separate", recomputed=recomputed).engine.module
    assert aligned.policy.is_gradient_checkpointing == recomputed
    assert aligned.critic.is_gradient_checkpointing == recomputed
    spec = RewardTrainerSpec(
        config=RewardConfig(vrm=HEAD, gradient_checkpointing=recomputed),
        backbone_uri=tiny_policy,
        statistics=statistics_of(world),
        num_steps=1,
        seed=0,
    )
    assert build_reward_trainer(spec, TorchEngine).engine.module.backbone.is_gradient_checkpointing == recomputed
