"""What is known of a decoder before it is loaded."""

from transformers import GPT2Config, Qwen3Config

from pipeline.models.backbone import kv_bytes_per_token


def test_a_cached_token_is_a_key_and_a_value_in_every_layer_and_key_value_head():
    grouped = Qwen3Config(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32
    )
    assert kv_bytes_per_token(grouped, "float32") == 2 * 3 * 2 * 32 * 4
    every_head_its_own = GPT2Config(n_embd=64, n_layer=3, n_head=4)
    assert kv_bytes_per_token(every_head_its_own, "bfloat16") == 2 * 3 * 4 * 16 * 2
