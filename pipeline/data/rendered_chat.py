"""Conversations that a trainer has already rendered to text, read back as messages.

Trainers send a reward server what their policy saw: one string, in the markup of the policy's chat template. The reward
model may use another template, so the string is taken apart here and rendered again by the reward model's own
(docs/method.md section 8).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.errors import DataError
from pipeline.records import Message


@dataclass(frozen=True)
class Markup:
    """How one family of chat templates writes a conversation."""

    name: str
    turn: re.Pattern[str]
    """A whole turn: role, content."""
    open_turn: re.Pattern[str]
    """The assistant's turn, not ended: content."""


def _markup(name: str, start: str, between: str, end: str) -> Markup:
    head = rf"{start}\s*(?P<role>system|user|assistant|model){between}"
    return Markup(
        name,
        re.compile(rf"{head}(?P<content>.*?){end}\s*", re.DOTALL),
        re.compile(rf"{start}\s*(?:assistant|model)(?:{between}(?P<content>.*))?\Z", re.DOTALL),
    )


MARKUPS = (
    _markup("ChatML", r"<\|im_start\|>", r"\s", r"<\|im_end\|>"),
    _markup("Llama 3", r"<\|start_header_id\|>", r"<\|end_header_id\|>\n\n", r"<\|eot_id\|>"),
    _markup("Gemma", r"<start_of_turn>", r"\n", r"<end_of_turn>"),
)

BEGINNINGS = ("<|begin_of_text|>", "<bos>", "<s>")
ENDINGS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end|>",
    "<end_of_turn>",
    "<eos>",
    "</s>",
)


def split_rendered(text: str, prompt: str | None = None) -> tuple[tuple[Message, ...], str]:
    """A rendered conversation as its messages and the response that ends it.

    Args:
        text: prompt and response in one string, special tokens included.
        prompt: the beginning of `text`. Everything after it is the response, even where the policy wrote an end of its
            turn and a next speaker. Without `prompt` such words are read as turns.

    Raises:
        DataError: no known markup and no such prompt, text between the turns, or no response at the end.
    """
    stripped = text
    for beginning in BEGINNINGS:
        stripped = stripped.removeprefix(beginning)
    response_length = len(text) - len(prompt) if prompt and text.startswith(prompt) else 0
    prompt_end = len(stripped) - response_length
    for markup in MARKUPS:
        turns, rest = _turns(stripped, markup, prompt_end)
        if not turns:
            continue
        if opened := markup.open_turn.match(rest):
            return tuple(turns), without_ending(opened["content"] or "")
        if without_ending(rest).strip():
            raise DataError(f"after {len(turns)} {markup.name} turns follows {rest[:60]!r}, which is no turn")
        if turns[-1]["role"] != "assistant" or len(turns) == 1:
            raise DataError(f"a conversation to score ends with the assistant, this one with {turns[-1]['role']!r}")
        return tuple(turns[:-1]), turns[-1]["content"]
    if prompt is not None and text.startswith(prompt):
        return ({"role": "user", "content": prompt},), without_ending(text[len(prompt) :])
    raise DataError(
        f"nothing in {text[:60]!r} says where the response begins. Send the conversation as ChatML, Llama 3 or Gemma "
        "turns, or with the prompt that it starts with."
    )


def without_ending(text: str) -> str:
    """A response without the tokens that end a turn or pad a batch, and the white space around those."""
    end = len(text)
    while True:
        # From the back and without copies: a text may be nothing but padding.
        last = end
        while last and text[last - 1].isspace():
            last -= 1
        ending = next((ending for ending in ENDINGS if text.endswith(ending, 0, last)), None)
        if ending is None:
            return text[:end]
        end = last - len(ending)


def _turns(text: str, markup: Markup, prompt_end: int) -> tuple[list[dict[str, str]], str]:
    """The complete turns before `prompt_end`, and the text after them."""
    turns, position = [], 0
    while turn := markup.turn.match(text, position, prompt_end):
        role = "assistant" if turn["role"] == "model" else turn["role"]
        turns.append({"role": role, "content": turn["content"]})
        position = turn.end()
    return turns, text[position:]
