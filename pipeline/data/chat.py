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

from pipeline.data.chat_rendering import render
from pipeline.data.end_of_turn import turn_end
from pipeline.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINKING_BEGINS, THINKING_ENDS = "<think>", "</think>"


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[int, ...]:
    """Token ids of the conversation up to the point where the assistant speaks.

    Raises:
        DataError: as `render`.
    """
    as_text: list[Message] = [{**message, "content": as_words(tokenizer, message["content"])} for message in messages]
    text = render(tokenizer, as_text, add_generation_prompt=True)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a response, ended by the end-of-turn token.

    Raises:
        DataError: as `turn_end`.
    """
    return (*tokenizer(as_words(tokenizer, text), add_special_tokens=False)["input_ids"], turn_end(tokenizer))


def as_words(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text, with a space in each special token that it spells: `<|im_end|>` becomes `< |im_end|>`.

    A tokenizer reads the spelling of a special token as the token. Without the space a text could end its own turn and
    write the next speaker's words.
    """
    special = _special_tokens(tokenizer, end=turn_end(tokenizer))
    return special.sub(lambda token: f"{token[0][0]} {token[0][1:]}", text)


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: PreTrainedTokenizerBase, end: int) -> re.Pattern[str]:
    # Those of the vocabulary, not `all_special_tokens`: Llama 3 does not count its <|eot_id|> among the latter.
    added = tokenizer.added_tokens_decoder.items()
    tokens = {token.content for index, token in added if token.special or index == end}
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def decode_response(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of sampled tokens, without special tokens and without the end of the turn."""
    # A checkpoint need not call the end of its turns special.
    words = [*token_ids[:-1]] if token_ids and token_ids[-1] == turn_end(tokenizer) else [*token_ids]
    return str(tokenizer.decode(words, skip_special_tokens=True)).strip()


def strip_thinking(text: str) -> str:
    """The answer without its `<think>...</think>` blocks and the space after them: a user reads no more than that.

    A first `</think>` without `<think>` ends a block too: some templates open the block in the prompt.
    """
    # By hand: a regular expression takes quadratic time over blocks that start and never end.
    ends = text.find(THINKING_ENDS)
    if ends >= 0 and THINKING_BEGINS not in text[:ends]:
        text = text[ends + len(THINKING_ENDS) :].lstrip()
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
