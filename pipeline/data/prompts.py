"""Prompts for alignment and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import tee
from typing import TYPE_CHECKING, Any, get_args

from pipeline.data.batching import step_indices
from pipeline.data.chat import encode_prompt
from pipeline.data.files import Row, distinct, read_rows, require_distinct_files
from pipeline.data.token_limit import require_enough_fit
from pipeline.errors import DataError
from pipeline.records import Message, Prompt, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_FIELDS = ("messages", "prompt", "instruction", "question")
EVALUATION_PROMPT_FIELDS = (*PROMPT_FIELDS, "turns")
BESIDE_THE_PROMPT = ("input", "system", "history")
"""Columns that become part of the prompt."""

PromptColumns = Mapping[str, Any]
"""The other columns of a prompt's row, for rewards."""


@dataclass(frozen=True, kw_only=True)
class PromptStream:
    """The prompts of each step: a pure function of (seed, step), so resume and scaling change nothing."""

    prompts: tuple[Prompt, ...]
    seed: int
    """Seed of the run. The seeds of the samples follow from it too."""

    def batch(self, step: int, size: int) -> list[Prompt]:
        """`size` prompts of a step; every prompt is used once per epoch."""
        return [self.prompts[i] for i in step_indices(len(self.prompts), size, step, self.seed)]


def parse_messages(value: Any, *, place: str) -> tuple[Message, ...]:
    """A prompt as chat turns: a string is one user turn.

    Raises:
        DataError: neither a non-empty string nor a list of {role, content} texts of which the last has words; or a role
            that is no `Role`. The message names `place`.
    """
    if isinstance(value, str) and value.strip():
        return ({"role": "user", "content": value},)
    is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    if is_list and all(_is_turn(m) for m in value) and value[-1]["content"].strip():
        if unknown := {m["role"] for m in value} - {*get_args(Role)}:
            raise DataError(
                f"{place}: a turn of the role {min(unknown)!r:.80}; known are {', '.join(get_args(Role))}. "
                "Rename it, or leave such conversations out."
            )
        return tuple({"role": m["role"], "content": m["content"]} for m in value)
    raise DataError(f"{place}: {value!r:.80} is no prompt; give a non-empty string or a list of {{role, content}}")


def split_conversation(value: Sequence[Any], *, place: str) -> tuple[tuple[Message, ...], str]:
    """(prompt, response) of a conversation that ends with the response; of the response alone the prompt is empty.

    Raises:
        DataError: it does not end with a turn of the assistant, or the turns before are no prompt.
    """
    *prompt, response = value
    if not _is_turn(response) or response["role"] != "assistant":
        raise DataError(f"{place}: the conversation must end with a turn of the role 'assistant'")
    return parse_messages(prompt, place=place) if prompt else (), response["content"]


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(field), str) for field in ("role", "content"))


def prompt_of(row: Row, fields: Sequence[str]) -> tuple[Message, ...]:
    """The prompt in the first of the fields that is there, with the `input`, `system` and `history` beside it.

    Alpaca's `input` follows its `instruction` after a blank line. `system` is a turn of its own before the others, and
    `history` holds the turns before the prompt: turns of {role, content}, or pairs of what user and assistant said.

    Raises:
        DataError: none of the fields is there; one of them, or of those beside it, cannot be used; the prompt has no
            turn of the user, or ends with a turn of the assistant.
    """
    field = next((name for name in fields if row.values.get(name) is not None), None)
    if field is None:
        if len(fields) == 1:
            raise DataError(f"{row.place}, field {fields[0]!r}: None is no prompt; {row.found}")
        raise DataError(f"{row.place}: none of the fields {', '.join(fields)} is there; {row.found}")
    place = f"{row.place}, field {field!r}"
    value = row.values[field]
    if field == "turns":
        # MT-Bench's and Arena-Hard's: the first one, which the others refer to.
        first = value[0] if isinstance(value, Sequence) and not isinstance(value, str) and value else None
        value = first.get("content") if isinstance(first, Mapping) else first
    return with_columns_beside(row, field, parse_messages(value, place=place))


def with_columns_beside(row: Row, field: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns of a field of the row, with its `input`, `system` and `history`, as `prompt_of` says.

    Raises:
        DataError: as `prompt_of`.
    """
    place = f"{row.place}, field {field!r}"
    messages = _with_input(row, field, messages)
    if history := row.values.get("history"):
        messages = (*_past_turns(history, place=f"{row.place}, field 'history'"), *messages)
    if row.values.get("system"):
        system: Message = {"role": "system", "content": row.require("system", str)}
        if any(message["role"] == "system" and message != system for message in messages):
            raise DataError(f"{row.place}, field 'system': the field {field!r} has another system turn. Keep one.")
        messages = messages if system in messages or not system["content"].strip() else (system, *messages)
    if all(message["role"] != "user" for message in messages):
        raise DataError(f"{place}: no turn of the user; give the question too")
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{place}: it ends with the assistant's turn, which is an answer. Leave that turn out.")
    return messages


def _with_input(row: Row, field: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not row.values.get("input"):
        return messages
    material = row.require("input", str)
    *earlier, last = messages
    if field == "instruction" and material.strip():
        return (*earlier, {**last, "content": f"{last['content']}\n\n{material}"})
    # Some publishers give the joined prompt as well.
    if material not in last["content"]:
        raise DataError(
            f"{row.place}, field 'input': it is not part of the field {field!r}. Join the two, or rename the latter to "
            "'instruction'."
        )
    return messages


def _past_turns(history: Any, *, place: str) -> tuple[Message, ...]:
    if isinstance(history, Sequence) and not isinstance(history, str):
        if all(_is_turn(turn) for turn in history):
            return parse_messages(history, place=place)
        if all(_is_exchange(turns) for turns in history):
            said = [(role, text) for turns in history for role, text in zip(("user", "assistant"), turns, strict=True)]
            return parse_messages([{"role": role, "content": text} for role, text in said], place=place)
    raise DataError(
        f"{place}: {history!r:.80} is no history; give turns of {{role, content}}, or pairs of texts of user and "
        "assistant"
    )


def _is_exchange(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(text, str) for text in value)


def read_prompts(files: Sequence[str]) -> Iterator[tuple[str, tuple[Message, ...]]]:
    """Streams (id, messages) of JSONL or Parquet files with one of the `PROMPT_FIELDS`.

    Raises:
        DataError: a file or a row cannot be used, or a file is named twice.
    """
    for identity, messages, _ in read_prompts_with_columns(files):
        yield identity, messages


def read_prompts_with_columns(files: Sequence[str]) -> Iterator[tuple[str, tuple[Message, ...], PromptColumns]]:
    """As `read_prompts`, with the columns of each row that are no part of the prompt: answers, tests, sources."""
    require_distinct_files(files)
    rows, again = tee(row for file in files for row in read_rows(file))
    for row, identity in zip(rows, distinct(row.identity for row in again), strict=True):
        messages = prompt_of(row, PROMPT_FIELDS)
        used = {next(name for name in PROMPT_FIELDS if row.values.get(name) is not None), *BESIDE_THE_PROMPT}
        yield identity, messages, {name: value for name, value in row.values.items() if name not in used}


def tokenise_prompts(
    prompts: Sequence[tuple[str, tuple[Message, ...]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    max_too_long: float = 1.0,
    section: str = "",
) -> list[Prompt]:
    """Encodes prompts and drops those longer than `max_prompt_tokens`.

    Args:
        section: of the recipe, that sets the limit.
        max_too_long: share of the prompts that may be dropped.

    Raises:
        DataError: nothing is left, or too little.
    """
    encoded = [
        Prompt(id=identity, messages=messages, token_ids=encode_prompt(tokenizer, messages))
        for identity, messages in prompts
    ]
    kept = [prompt for prompt in encoded if len(prompt.token_ids) <= max_prompt_tokens]
    lengths = [len(prompt.token_ids) for prompt in encoded]
    limit = f"{section}{'.' if section else ''}max_prompt_tokens = {max_prompt_tokens}"
    require_enough_fit(lengths, len(kept), kind="prompts", limit=limit, max_too_long=max_too_long)
    return kept
