"""Prompts and responses as the tokens that a scorer reads: fitted to the model's length, in packed batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pipeline.data.batching import plan_micro_batches
from pipeline.data.chat import encode_prompt, encode_response, fit_prompt, strip_thinking
from pipeline.errors import DataError
from pipeline.models.packing import PackedTokens, in_packed_order, pack
from pipeline.records import Message, PromptGroup

EncodedPair = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt, and of its response with the end-of-turn token."""


@dataclass(frozen=True, kw_only=True)
class ConversationEncoder:
    """Encodes conversations for a model that reads `max_length` tokens."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def __call__(self, prompts: Sequence[tuple[Message, ...]], responses: Sequence[str]) -> list[EncodedPair]:
        """If prompt and response exceed `max_length`, the prompt is cut from the left. A response that alone exceeds it
        is cut at its end. The end-of-turn token always stays, or truncation would become a feature.

        Raises:
            DataError: not as many prompts as responses.
        """
        if len(prompts) != len(responses):
            raise DataError(f"{len(prompts)} prompts but {len(responses)} responses to score")
        return [self._encode(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]

    def fits(self, prompt: tuple[Message, ...], response: str) -> bool:
        """Whether nothing of prompt and response is cut."""
        response_ids = encode_response(self.tokenizer, strip_thinking(response))
        return len(encode_prompt(self.tokenizer, prompt)) + len(response_ids) <= self.max_length

    def _encode(self, prompt: tuple[Message, ...], response: str) -> EncodedPair:
        response_ids = encode_response(self.tokenizer, strip_thinking(response))
        if len(response_ids) >= self.max_length:
            response_ids = (*response_ids[: self.max_length - 2], response_ids[-1])
        return fit_prompt(encode_prompt(self.tokenizer, prompt), response_ids, self.max_length), response_ids


def packed_batches(encoded: Sequence[EncodedPair], *, max_tokens: int) -> Iterator[tuple[list[int], PackedTokens]]:
    """Batches of at most `max_tokens` tokens in which rows with equal prompts share them.

    Yields:
        (rows of `encoded` in the order of the packed responses, tokens)
    """
    shared = _share_prompts(encoded, max_tokens=max_tokens)
    groups = [
        PromptGroup(prompt_ids=encoded[rows[0]][0], response_ids=tuple(encoded[row][1] for row in rows))
        for rows in shared
    ]
    if not groups:
        return
    lengths = [group.num_tokens for group in groups]
    for batch in plan_micro_batches(lengths, world_size=1, max_tokens=max_tokens)[0]:
        yield in_packed_order([shared[g] for g in batch]), pack([groups[g] for g in batch])


def _share_prompts(encoded: Sequence[EncodedPair], *, max_tokens: int) -> list[list[int]]:
    """Groups of rows with equal prompts. A group fits in `max_tokens`, with its prompt counted once."""
    groups: list[list[int]] = []
    latest: dict[tuple[int, ...], tuple[list[int], int]] = {}
    for row, (prompt_ids, response_ids) in enumerate(encoded):
        group, room = latest.get(prompt_ids, ([], 0))
        if len(response_ids) > room:
            group, room = [], max_tokens - len(prompt_ids)
            groups.append(group)
        group.append(row)
        latest[prompt_ids] = group, room - len(response_ids)
    return groups
