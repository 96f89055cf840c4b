"""Architectures from config.json files, and those that the package knows."""

import json

import pytest
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.planning.decoder_shape import (
    DENSE_FAMILIES,
    EXPERT_WIDTHS,
    checkpoint_shape,
    policy_shape,
    shape_from_config,
)
from cluster.planning.known_decoders import KNOWN_DECODERS
from pipeline.config.models import LoRAConfig, PolicyConfig
from pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("checkpoint", "parameters"),
    [
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen3-32B", 32_762_123_264),
        ("FuseAI/FuseChat-Qwen-2.5-7B-SFT", 7_615_616_512),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
    ],
)
def test_known_decoders_have_the_parameters_that_are_published(checkpoint, parameters, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert checkpoint_shape(checkpoint).num_parameters == parameters


def test_a_reward_backbone_has_no_language_head():
    shape = checkpoint_shape("Qwen/Qwen3-8B")
    assert shape.num_parameters - shape.trunk_parameters == 151_936 * 4096


def test_adapters_of_two_layers():
    lora = LoRAConfig(rank=8, alpha=16, targets=("q_proj", "down_proj"))
    # 36 layers; q_proj maps 4,096 to 4,096, down_proj 12,288 to 4,096.
    assert checkpoint_shape("Qwen/Qwen3-8B").lora_parameters(lora) == 36 * 8 * (8192 + 16_384)


def test_a_config_in_the_hubs_cache_goes_before_what_the_package_knows(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    model = tmp_path / "hub" / "models--Qwen--Qwen3-8B"
    (model / "snapshots" / "abc").mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc")
    written = {**KNOWN_DECODERS["Qwen/Qwen3-8B"], "num_hidden_layers": 7}
    (model / "snapshots" / "abc" / "config.json").write_text(json.dumps(written))
    shape = checkpoint_shape("Qwen/Qwen3-8B")
    assert (shape.num_layers, shape.source) == (7, str(model / "snapshots" / "abc" / "config.json"))


def test_a_named_config_goes_before_the_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_DECODERS["Qwen/Qwen3-0.6B"]))
    assert policy_shape(PolicyConfig(checkpoint="Qwen/Qwen3-8B"), str(tmp_path)).num_layers == 28


SIZES = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("family", sorted(DENSE_FAMILIES | EXPERT_WIDTHS.keys()))
def test_every_planned_family_has_the_parameters_that_transformers_makes(family):
    config = AutoConfig.for_model(family, **SIZES)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # A config.json leaves out what is usual: Gemma's, that its head is the embedding.
    written = {key: value for key, value in config.to_dict().items() if key != "tie_word_embeddings"}
    shape = shape_from_config(written, source="a test")
    assert shape.num_parameters == pytest.approx(parameters, rel=0.002)  # norms differ
    if family in EXPERT_WIDTHS:
        assert shape.largest_matrix == max(parameter.numel() for parameter in model.parameters())


QWEN3_30B_A3B = {
    **KNOWN_DECODERS["Qwen/Qwen3-8B"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
}


def test_a_token_passes_a_few_experts_of_a_mixture_and_memory_holds_all():
    shape = shape_from_config(QWEN3_30B_A3B, source="a test")
    assert shape.num_parameters == 30_532_122_624  # as published: 30.5B, of which 3.3B work on a token
    active = shape.num_layers * shape.layer_matrix_parameters + 2 * shape.vocabulary_parameters
    assert active == pytest.approx(3.35e9, rel=0.01)
    with pytest.raises(ConfigError, match="in a mixture all layers have experts"):
        shape_from_config(QWEN3_30B_A3B | {"mlp_only_layers": [0]}, source="a test")


def test_a_checkpoint_that_nobody_knows_has_no_shape(tmp_path):
    assert checkpoint_shape("somebody/some-model") is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 768}))
    assert checkpoint_shape(str(tmp_path)) is None


def test_a_named_config_that_is_missing_or_no_decoders_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cluster\.plan\.policy_config = .*there is no such file"):
        policy_shape(PolicyConfig(), str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="x has no hidden_size"):
        shape_from_config({"model_type": "llama", "num_attention_heads": 2}, source="x")
    with pytest.raises(ConfigError, match="x is of model_type 'gpt2', whose memory and time cannot be planned"):
        shape_from_config({"model_type": "gpt2", "n_embd": 768}, source="x")


def test_the_tiny_policy_is_as_large_as_the_one_that_is_created(tokenizer):
    from pipeline.models.backbone import create_tiny_causal_lm

    policy = PolicyConfig()
    model = create_tiny_causal_lm(policy.tiny, tokenizer, seed=0)
    assert policy_shape(policy, None).num_parameters == sum(parameter.numel() for parameter in model.parameters())
