"""Tokenizers and templates in the shape of well-known families, over single bytes, and tiny random models for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase
from transformers import PreTrainedTokenizerFast as FastTokenizer

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
"""What a user may write for a model that has no template."""


@dataclass(frozen=True)
class Family:
    """How one family ends a turn."""

    special: tuple[str, ...]
    """Tokens 256, 257, ...; those before are the bytes."""
    eos: str
    template: str | None
    own_ends: tuple[str, ...]
    """What generation_config.json of the family names."""
    ends: tuple[str, ...]
    """Where a response ends; the token of the template first."""
    not_special: tuple[str, ...] = ()
    """Tokens added after the others, without being called special."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        backend = Tokenizer(models.BPE(letters, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([*self.special])
        backend.add_tokens([AddedToken(token, special=False) for token in self.not_special])
        return FastTokenizer(
            tokenizer_object=backend, bos_token=self.special[0], eos_token=self.eos, chat_template=self.template
        )

    def write(self, directory: str | Path, *, ending: str | None = None) -> str:
        """A random two-layer model as its publisher would save it, not this project.

        Args:
            ending: a token to which it gives about a sixth of the probability; None gives all about the same.
        """
        tokenizer = self.tokenizer()
        config = AutoConfig.for_model(
            "qwen3",
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=256,
            tie_word_embeddings=False,
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        if ending is not None:
            with torch.no_grad():
                # One dimension of the state outweighs the others wherever the model is, and only this token reads it.
                model.model.embed_tokens.weight[:, 0] = 4.0
                model.lm_head.weight[:, 0] = 0.0
                model.lm_head.weight[tokenizer.convert_tokens_to_ids(ending), 0] = 0.5
        own = [tokenizer.convert_tokens_to_ids(token) for token in self.own_ends]
        model.generation_config = GenerationConfig(eos_token_id=own[0] if len(own) == 1 else own)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return str(directory)


FAMILIES = {
    "Gemma": Family(
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        GEMMA,
        ("<eos>", "<end_of_turn>"),
        ("<end_of_turn>", "<eos>"),
    ),
    "Phi-3.5": Family(
        ("<s>", "<|endoftext|>", "<|assistant|>", "<|user|>", "<|system|>", "<|end|>"),
        "<|endoftext|>",
        PHI,
        ("<|end|>", "<|assistant|>", "<|endoftext|>"),
        ("<|end|>", "<|endoftext|>", "<|assistant|>"),
    ),
    "Llama-3": Family(
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|eot_id|>",
        ),
        "<|eot_id|>",
        LLAMA,
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
    ),
    "Qwen3": Family(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        QWEN,
        ("<|im_end|>", "<|endoftext|>"),
        ("<|im_end|>", "<|endoftext|>"),
    ),
    "Qwen3, base": Family(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|endoftext|>",
        QWEN,
        ("<|endoftext|>",),
        ("<|im_end|>", "<|endoftext|>"),
    ),
    "GPT-2": Family(("<|endoftext|>",), "<|endoftext|>", None, ("<|endoftext|>",), ("<|endoftext|>",)),
    "GPT-2, plain": Family(("<|endoftext|>",), "<|endoftext|>", PLAIN, ("<|endoftext|>",), ("<|endoftext|>",)),
    "turns that are not special": Family(
        ("<|endoftext|>",),
        "<|endoftext|>",
        QWEN,
        ("<|endoftext|>",),
        ("<|im_end|>", "<|endoftext|>"),
        not_special=("<|im_start|>", "<|im_end|>"),
    ),
}
