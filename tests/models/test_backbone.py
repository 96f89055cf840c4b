"""What is known of a decoder before it is loaded."""

import pytest
from transformers import GPT2Config, Qwen3Config

from pipeline.data.planted import build_tokenizer
from pipeline.errors import ConfigError
from pipeline.models.backbone import kv_bytes_per_token, require_same_tokens


def test_a_critic_reads_a_policy_whose_vocabulary_is_its_own_or_longer_by_special_tokens():
    known, policy = build_tokenizer(), build_tokenizer()
    policy.add_special_tokens({"additional_special_tokens": ["<think>"]})
    require_same_tokens(policy, known, num_rows=len(policy))


def test_a_token_that_is_another_one_or_none_to_the_critic_is_refused():
    policy = build_tokenizer()
    with pytest.raises(ConfigError, match=r"'separate' .* 3 of [\d,]+ are other tokens to it or none .*value_head"):
        require_same_tokens(policy, policy, num_rows=len(policy) - 3)
    other = build_tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<image>"]})
    policy.add_special_tokens({"additional_special_tokens": ["<think>"]})
    with pytest.raises(ConfigError, match=r"1 of [\d,]+ are other tokens .*'<think>'"):
        require_same_tokens(policy, other, num_rows=len(policy))


def test_a_cached_token_is_a_key_and_a_value_in_every_layer_and_key_value_head():
    grouped = Qwen3Config(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32
    )
    assert kv_bytes_per_token(grouped, "float32") == 2 * 3 * 2 * 32 * 4
    every_head_its_own = GPT2Config(n_embd=64, n_layer=3, n_head=4)
    assert kv_bytes_per_token(every_head_its_own, "bfloat16") == 2 * 3 * 4 * 16 * 2
