"""A conversation as the text that a chat template makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from pipeline.errors import DataError
from pipeline.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = datetime(2024, 7, 26)
"""The date for templates that ask for today's (`strftime_now`): one and the same, so that a run which is resumed after
midnight reads the same tokens. It is the date that Llama 3.1's template takes where it cannot ask."""


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


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """The conversation in the template's markup.

    Args:
        add_generation_prompt: begins the assistant's next turn.

    Raises:
        DataError: there is no template; it refuses the messages, say two turns of the same speaker; or it leaves out
            what the user or the system says.
    """
    require_chat_template(tokenizer)
    try:
        text = str(
            tokenizer.apply_chat_template(
                [{**message} for message in messages],
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                enable_thinking=False,
                strftime_now=DATE.strftime,
            )
        )
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages) or "none"
        raise DataError(
            f"the tokenizer's chat template refuses this conversation (speakers: {roles}): {error}"
        ) from error
    # Templates trim texts and join their lines.
    written = _without_space(text)
    for message in messages:
        if message["role"] != "assistant" and _without_space(message["content"]) not in written:
            raise DataError(
                f"the tokenizer's chat template leaves out the words of the {message['role']}, "
                f"{message['content']!r:.60}. A template that wants content parts, or has no system turn, cannot be "
                "used here: give the checkpoint a template that writes `message['content']` as text."
            )
    return text


def _without_space(text: str) -> str:
    return "".join(text.split())
