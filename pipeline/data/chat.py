"""Messages to tokens, in one place (docs/method.md section 8).

The chat template renders the prompt, the response is encoded on its own, and the ids are concatenated. So the prompt is
an exact prefix of the whole, and the last scored token always ends the turn. Only the chat template writes special
tokens: a text that spells one stays text, so no message can end its own turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from pipeline.errors import DataError
from pipeline.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINKING_BEGINS, THINKING_ENDS = "<think>", "</think>"


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises DataError for a tokenizer that cannot render a conversation."""
    if tokenizer.chat_template is None:
        raise no_chat_template(tokenizer.name_or_path)


def no_chat_template(checkpoint: str) -> DataError:
    """The error about a tokenizer that cannot render a conversation."""
    return DataError(
        f"the tokenizer of {checkpoint!r} has no chat template, so messages cannot become a prompt. "
        "Use an instruction-tuned checkpoint, or add chat_template.jinja to its directory."
    )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[int, ...]:
    """Token ids of the conversation up to the point where the assistant speaks.

    Raises:
        DataError: the chat template refuses the messages, say two turns of the same speaker.
    """
    try:
        text = tokenizer.apply_chat_template(
            [{**message, "content": as_words(tokenizer, message["content"])} for message in messages],
            add_generation_prompt=True,
            tokenize=False,
            enable_thinking=False,
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages) or "none"
        raise DataError(
            f"the tokenizer's chat template refuses this conversation (speakers: {roles}): {error}"
        ) from error
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a response, ended by the end-of-turn token."""
    return (*tokenizer(as_words(tokenizer, text), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)


def as_words(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text, with a space in each special token that it spells: `<|im_end|>` becomes `< |im_end|>`.

    A tokenizer reads the spelling of a special token as the token. Without the space a text could end its own turn and
    write the next speaker's words.
    """
    return _special_tokens(tokenizer).sub(lambda token: f"{token[0][0]} {token[0][1:]}", text)


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    # Those of the vocabulary, not `all_special_tokens`: Llama 3 does not count its <|eot_id|> among the latter.
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def decode_response(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of sampled tokens, without special tokens."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()


def strip_thinking(text: str) -> str:
    """The answer without its `<think>...</think>` blocks and the space after them: a user reads no more than that."""
    # By hand: a regular expression takes quadratic time over blocks that start and never end.
    kept, position = [], 0
    while (begins := text.find(THINKING_BEGINS, position)) >= 0 and (ends := text.find(THINKING_ENDS, begins)) >= 0:
        kept.append(text[position:begins])
        position = ends + len(THINKING_ENDS)
        while text[position : position + 1].isspace():
            position += 1
    return "".join([*kept, text[position:]])


def fit_prompt(prompt_ids: tuple[int, ...], response_ids: tuple[int, ...], max_length: int) -> tuple[int, ...]:
    """The prompt, cut from the left until prompt and response fit; at least one token of it stays."""
    room = max_length - len(response_ids)
    return prompt_ids[-max(1, room) :]
