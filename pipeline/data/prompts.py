"""Prompts for alignment and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import tee
from typing import TYPE_CHECKING, Any, get_args

from pipeline.data.batching import step_indices
from pipeline.data.chat import encode_prompt
from pipeline.data.files import distinct, read_rows
from pipeline.errors import DataError
from pipeline.records import Message, Prompt, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_FIELDS = ("messages", "prompt", "instruction")


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


def read_prompts(files: Sequence[str]) -> Iterator[tuple[str, tuple[Message, ...]]]:
    """Streams (id, messages) of JSONL or Parquet files with a field `messages`, `prompt` or `instruction`."""
    rows, again = tee(row for file in files for row in read_rows(file))
    for row, identity in zip(rows, distinct(row.identity for row in again), strict=True):
        field = next((name for name in PROMPT_FIELDS if row.values.get(name) is not None), None)
        if field is None:
            raise DataError(f"{row.place}: none of the fields {', '.join(PROMPT_FIELDS)} is there")
        yield identity, parse_messages(row.values[field], place=f"{row.place}, field {field!r}")


def tokenise_prompts(
    prompts: Sequence[tuple[str, tuple[Message, ...]]], tokenizer: PreTrainedTokenizerBase, *, max_prompt_tokens: int
) -> list[Prompt]:
    """Encodes prompts and drops those longer than `max_prompt_tokens`.

    Raises:
        DataError: nothing is left.
    """
    encoded = [
        Prompt(id=identity, messages=messages, token_ids=encode_prompt(tokenizer, messages))
        for identity, messages in prompts
    ]
    kept = [prompt for prompt in encoded if len(prompt.token_ids) <= max_prompt_tokens]
    if not kept:
        shortest = min((len(prompt.token_ids) for prompt in encoded), default=0)
        raise DataError(
            f"none of {len(prompts)} prompts fits in max_prompt_tokens = {max_prompt_tokens} "
            f"(the shortest has {shortest}). Raise it, or give shorter prompts."
        )
    return kept
