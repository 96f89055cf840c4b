"""The architecture of small Qwen3 models for speed measurements."""

from transformers import PreTrainedTokenizerBase, Qwen3Config


def small_qwen3(tokenizer: PreTrainedTokenizerBase, *, hidden_size: int, layers: int) -> Qwen3Config:
    """A Qwen3 of a given width and depth: heads of 64 dimensions, half as many key-value heads, one label."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(1, hidden_size // 128),
        head_dim=64,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
