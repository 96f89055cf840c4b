"""Which tokens end the assistant's turn: the only place that knows.

A model can have several. Gemma's template ends a turn with <end_of_turn>, while its `eos_token` is <eos>. Llama 3's
generation_config.json names <|end_of_text|>, <|eom_id|> and <|eot_id|>. What is taught and scored ends with the token
of the template. A sampler stops at any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from pipeline.data.chat_rendering import render
from pipeline.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER = "zqxjkvbw"
"""No template writes this word of its own."""


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that the chat template writes behind an answer; `eos_token` where it writes none, or is not there.

    Raises:
        DataError: the template refuses a question with its answer, or leaves the answer out.
    """
    # The template is part of the key: it can be replaced.
    return _turn_end(tokenizer, repr(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _turn_end(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> int:
    eos: int = tokenizer.eos_token_id
    if tokenizer.chat_template is None:
        return eos
    text = render(
        tokenizer,
        [{"role": "user", "content": "a question"}, {"role": "assistant", "content": ANSWER}],
        add_generation_prompt=False,
    )
    _, answer, behind = text.rpartition(ANSWER)
    if not answer:
        raise DataError(
            "the tokenizer's chat template leaves out the words of the assistant. Give the checkpoint a template that "
            "writes `message['content']` as text."
        )
    token_ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    special = {eos, *(index for index, token in added.items() if token.special)}
    # Fine-tuned checkpoints add the tokens of their turns without calling them special.
    words = {index for index, token in added.items() if token.content.strip()}
    for marks in (special, words):
        if ends := [index for index in token_ids if index in marks]:
            return ends[0]
    return eos


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, eos_token_id: int | Sequence[int] | None) -> tuple[int, ...]:
    """Every token at which a sampler stops: that of the template first, then `eos_token`, then the model's own.

    Args:
        eos_token_id: of the model's generation config. Ids that the tokenizer has no token for cannot be sampled, and
            are left out: some configs keep those of another vocabulary.

    Raises:
        DataError: as `turn_end`.
    """
    own = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or ()
    known = [index for index in own if 0 <= index < len(tokenizer)]
    return tuple(dict.fromkeys((turn_end(tokenizer), tokenizer.eos_token_id, *known)))
