"""Messages to tokens, in one place (vrm_spec section 4.3).

The prompt is rendered by the chat template, the response is encoded on its own, and the ids are concatenated: the
prompt is an exact prefix of the whole, and the last scored token is always the one that ends the turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError
from pipeline.records import Message

THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises DataError for a tokenizer that cannot render a conversation."""
    if tokenizer.chat_template is None:
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, so messages cannot become a prompt. "
            "Use an instruction-tuned checkpoint, or add chat_template.jinja to its directory."
        )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[int, ...]:
    """Token ids of the conversation up to the point where the assistant speaks.

    Raises:
        DataError: the chat template refuses the messages, say two turns of the same speaker.
    """
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages) or "none"
        raise DataError(
            f"the tokenizer's chat template refuses this conversation (speakers: {roles}): {error}"
        ) from error
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a response, ended by the end-of-turn token."""
    return (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)


def decode_response(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of sampled tokens, without special tokens."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()


def strip_thinking(text: str) -> str:
    """The answer without its `<think>...</think>` blocks: a reward judges what the user reads."""
    return THINKING.sub("", text)


def fit_prompt(prompt_ids: tuple[int, ...], response_ids: tuple[int, ...], max_length: int) -> tuple[int, ...]:
    """The prompt, cut from the left until prompt and response fit; at least one token of it stays."""
    room = max_length - len(response_ids)
    return prompt_ids[-max(1, room) :]
