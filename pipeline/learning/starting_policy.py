"""The policy before any training, as a directory."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from pipeline.config.models import PolicyConfig
from pipeline.data.chat_rendering import require_chat_template
from pipeline.data.planted import build_tokenizer
from pipeline.models.backbone import create_tiny_causal_lm, load_causal_lm, save_causal_lm


def write_starting_policy(policy: PolicyConfig, directory: str, *, seed: int) -> PreTrainedTokenizerBase:
    """The checkpoint the recipe names, or a tiny random model, as a Hugging Face directory. Returns its tokenizer.

    Raises:
        CheckpointError: the checkpoint cannot be loaded whole, or is no causal decoder.
        DataError: its tokenizer has no chat template.
    """
    tokenizer: PreTrainedTokenizerBase
    if policy.checkpoint is None:
        tokenizer = build_tokenizer()
        model = create_tiny_causal_lm(policy.tiny, tokenizer, seed=seed)
    else:
        model, tokenizer = load_causal_lm(
            policy.checkpoint, dtype=policy.dtype, trust_remote_code=policy.trust_remote_code
        )
    require_chat_template(tokenizer)
    save_causal_lm(model.state_dict(), model.config, tokenizer, directory)
    return tokenizer
