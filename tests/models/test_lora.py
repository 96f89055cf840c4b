"""Adapters: what trains, what the model computes with them on and off, and what leaves the learner."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.config.load import load_recipe
from pipeline.config.models import LoRAConfig
from pipeline.errors import ConfigError
from pipeline.evaluation.reward_scorer import RewardModelScorer
from pipeline.models.backbone import load_causal_lm, require_lora_targets
from pipeline.models.lora import adapters_off, add_lora, merged_tensors
from pipeline.models.packing import pack, packed_states, use_packed_attention
from pipeline.rollouts.publishing import publish_checkpoint
from tests.learning.test_updates import experience_of, samples_of
from tests.models.test_packing import DECODERS, GROUPS, decoder
from tests.support.learners import ALIGNMENT, collator, ppo_learner, reward_trainer, tokenised

LORA = LoRAConfig(rank=4, alpha=8)
PACKED = pack(GROUPS)


def aligned_with(**ppo):
    return ALIGNMENT.model_copy(update={"ppo": ALIGNMENT.ppo.model_copy(update={"lora": LORA, **ppo})})


def move(model):
    """Adapters as after training: no longer zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)


def trainable(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", DECODERS)
def test_adapters_off_is_the_base_bit_for_bit_and_merged_weights_compute_the_adapted_states(family):
    plain, adapted = decoder(family), decoder(family)
    use_packed_attention(plain)
    use_packed_attention(adapted)
    add_lora(adapted, LORA, seed=0)
    with torch.no_grad():
        base = packed_states(plain, PACKED)
        assert torch.equal(packed_states(adapted, PACKED), base)  # B starts at zero
        move(adapted)
        states = packed_states(adapted, PACKED)
        assert (states - base).abs().max() > 0.01
        with adapters_off(adapted):
            assert torch.equal(packed_states(adapted, PACKED), base)
        assert torch.equal(packed_states(adapted, PACKED), states)
        plain.load_state_dict(dict(merged_tensors(adapted.state_dict().items(), adapted)))
        torch.testing.assert_close(packed_states(plain, PACKED), states, atol=1e-5, rtol=1e-5)


def test_a_merged_weight_is_w_plus_alpha_over_rank_times_b_a():
    model = decoder("qwen2")
    add_lora(model, LoRAConfig(rank=1, alpha=3, targets=("q_proj",)), seed=0)
    name = "layers.0.self_attn.q_proj"
    state = model.state_dict()
    state[f"{name}.lora_A.default.weight"] = torch.zeros(1, 32).index_fill(1, torch.tensor([5]), 2.0)
    state[f"{name}.lora_B.default.weight"] = torch.zeros(32, 1).index_fill(0, torch.tensor([7]), 0.5)
    plain = dict(merged_tensors(state.items(), model))
    gained = plain[f"{name}.weight"] - state[f"{name}.base_layer.weight"]
    assert gained[7, 5].item() == pytest.approx(3.0, rel=1e-6)  # 3 / 1 * 0.5 * 2
    assert gained.count_nonzero() == 1
    assert plain.keys() == decoder("qwen2").state_dict().keys()
    assert torch.equal(plain[f"{name}.bias"], state[f"{name}.base_layer.bias"])


def test_without_targets_every_linear_layer_but_the_head_gets_an_adapter_and_nothing_else_trains(tiny_policy):
    lm, _ = load_causal_lm(tiny_policy, dtype="float32")
    add_lora(lm, LORA, seed=0)
    layers = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    layers += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert trainable(lm) == {
        f"model.layers.{n}.{layer}.lora_{part}.default.weight" for n in (0, 1) for layer in layers for part in "AB"
    }


def test_peft_computes_the_same_from_the_same_adapters(tiny_policy):
    ours, _ = load_causal_lm(tiny_policy, dtype="float32")
    add_lora(ours, LORA, seed=0)
    move(ours)
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_policy),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    adapters = {f"base_model.model.{n}": t for n, t in ours.state_dict().items() if "lora_" in n}
    assert not theirs.load_state_dict(adapters, strict=False).unexpected_keys
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    unloaded = theirs.merge_and_unload().state_dict()
    for name, tensor in merged_tensors(ours.state_dict().items(), ours):
        torch.testing.assert_close(tensor, unloaded[name], atol=1e-6, rtol=1e-6)


def test_a_target_that_is_no_layer_is_refused_with_those_that_are(tiny_policy):
    require_lora_targets(tiny_policy, LoRAConfig(targets=("q_proj", "down_proj")), "reward")
    with pytest.raises(
        ConfigError,
        match=r"reward\.lora\.targets: a qwen3 model has no linear layer named c_attn\. It has down_proj, "
        r"gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj; \[\]",
    ):
        require_lora_targets(tiny_policy, LoRAConfig(targets=("q_proj", "c_attn")), "reward")


def test_adapters_and_last_layers_or_dropout_in_ppo_are_refused():
    with pytest.raises(ConfigError, match="trainable_layers = 2 and lora exclude each other"):
        load_recipe("tiny", ["reward.lora.rank=8", "reward.trainable_layers=2"])
    with pytest.raises(ConfigError, match=r"lora\.dropout = 0\.1: with dropout the probability ratio"):
        load_recipe("tiny", ["alignment.ppo.lora.dropout=0.1"])
    assert load_recipe("tiny", ["alignment.ppo.lora.rank=8"]).alignment.ppo.lora == LoRAConfig(rank=8)


# ----------------------------------------------------------------------------- reward model


def test_a_reward_model_trains_its_adapters_and_head_alone_and_is_served_as_any_other(
    tiny_policy, world, tokenizer, tmp_path
):
    trainer = reward_trainer(tiny_policy, world, tokenizer, lora=LORA)
    model = trainer.engine.module
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = collator(world, tokenizer)(tokenised(world, tokenizer)[:6], step=0)
    for step in range(4):
        trainer.update(batch, step)
    for name, tensor in model.state_dict().items():
        # The error bar is fitted when training has ended.
        is_trained = "lora_" in name or (name.startswith("head.") and not name.startswith("head.last_layer."))
        assert torch.equal(tensor, before[name]) != is_trained, name
    trainer.evaluate(batch)
    trainer.export(str(tmp_path))
    assert not any("lora" in name or "base_layer" in name for name in load_file(tmp_path / "model.safetensors"))
    served = RewardModelScorer.load(str(tmp_path), max_tokens_per_batch=200)
    learner = RewardModelScorer(model.eval(), tokenizer, trainer.card, max_tokens_per_batch=200)
    prompts, responses = zip(*((p.prompt, p.chosen) for p in world.heldout_pairs()[:4]), strict=True)
    for theirs, ours in zip(served.score(prompts, responses), learner.score(prompts, responses), strict=True):
        assert theirs.mean == pytest.approx(ours.mean, abs=1e-5)
        assert theirs.std == pytest.approx(ours.std, abs=1e-5)


# ----------------------------------------------------------------------------- policy


def test_the_reference_is_the_policy_with_its_adapters_off_and_takes_no_memory(tiny_policy, world, tokenizer, tmp_path):
    plain = ppo_learner(tiny_policy, world, tokenizer, tmp_path / "plain")
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path / "lora", config=aligned_with())
    samples = samples_of(plain, world, tokenizer)
    experience = experience_of(learner, world, tokenizer)
    for step in range(2):
        learner.update(experience, step)
    expected, evaluated = plain.evaluate_tokens(samples), learner.evaluate_tokens(samples)
    assert [e.reference_logprobs for e in evaluated] == [e.reference_logprobs for e in expected]  # bit for bit
    assert max(abs(a - b) for e in evaluated for a, b in zip(e.logprobs, e.reference_logprobs, strict=True)) > 1e-4

    def parameters(module):
        return sum(p.numel() for p in module.parameters())

    base = parameters(load_causal_lm(tiny_policy, dtype="float32")[0])
    adapters = sum(p.numel() for n, p in learner.engine.module.named_parameters() if "lora_" in n)
    assert parameters(learner.engine.module) == base + adapters + 65  # the value head: 64 weights and a bias
    # All that the reference can reach is the engine.
    assert [cell.cell_contents for cell in learner.reference.__closure__] == [learner.engine]


def test_an_update_of_the_policy_moves_adapters_and_critic_alone(tiny_policy, world, tokenizer, tmp_path):
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path, config=aligned_with(critic="separate"))
    model = learner.engine.module
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    experience = experience_of(learner, world, tokenizer)
    for step in range(2):
        learner.update(experience, step)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != ("lora_" in name or name.startswith("value_head.")), name


def test_published_weights_are_merged_and_say_what_the_learner_says(tiny_policy, world, tokenizer, tmp_path):
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path, config=aligned_with())
    move(learner.engine.module)
    adapted = set(learner.engine.module.state_dict())
    published = learner.publish_weights(1)
    state = load_file(f"{published.location}/model.safetensors")
    assert state.keys() == load_file(f"{tiny_policy}/model.safetensors").keys()
    sent = dict(learner.policy_tensors())
    assert sent.keys() == state.keys()
    assert all(torch.equal(sent[name], state[name]) for name in state)
    assert set(learner.engine.module.state_dict()) == adapted
    learner.export(str(tmp_path / "result"))
    engine = publish_checkpoint(
        str(tmp_path / "result"), str(tmp_path / "engine"), learner.probes, dtype="float32", version=1
    )
    base = publish_checkpoint(tiny_policy, str(tmp_path / "base"), learner.probes, dtype="float32", version=0)
    for ours, theirs, unadapted in zip(published.probes, engine.probes, base.probes, strict=True):
        assert theirs.logprobs == pytest.approx(ours.logprobs, abs=1e-4)
        assert unadapted.logprobs != pytest.approx(ours.logprobs, abs=1e-2)


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_recomputed_activations_give_the_same_gradients(lora, tiny_policy, world, tokenizer, tmp_path):
    steps = []
    for recompute in (False, True):
        config = aligned_with(lora=lora, critic="separate").model_copy(update={"gradient_checkpointing": recompute})
        learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path, config=config)
        learner.update(experience_of(learner, world, tokenizer), 0)
        steps.append(dict(learner.engine.stream().tensors))
    for name in steps[0]:
        torch.testing.assert_close(steps[0][name], steps[1][name], atol=1e-6, rtol=1e-5)
