"""Preference pairs to tokens, and tokens to batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.data.batching import stable_seed
from pipeline.data.chat import encode_prompt, encode_response, fit_prompt, strip_thinking
from pipeline.data.score_statistics import ScoreStatistics
from pipeline.errors import DataError
from pipeline.objectives.variational import supervision_scores, supervision_target
from pipeline.records import Message, PreferenceBatch, PreferencePair, TokenisedText


@dataclass(frozen=True, kw_only=True)
class TokenisedPair:
    """A pair in the reward model's tokens; both sequences begin with the same prompt."""

    pair: PreferencePair
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]

    @property
    def longest(self) -> int:
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


def tokenise_pairs(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, *, max_length: int, drop_too_long: bool
) -> list[TokenisedPair]:
    """Encodes pairs. Training drops those longer than `max_length`; evaluation cuts the prompt from the left instead.

    Raises:
        DataError: nothing is left.
    """
    tokenised = []
    for pair in pairs:
        prompt = encode_prompt(tokenizer, pair.prompt)
        chosen, rejected = (encode_response(tokenizer, strip_thinking(text)) for text in (pair.chosen, pair.rejected))
        longest = max(len(chosen), len(rejected))
        if len(prompt) + longest > max_length:
            if drop_too_long or longest >= max_length:
                continue
            prompt = fit_prompt(prompt, max(chosen, rejected, key=len), max_length)
        tokenised.append(TokenisedPair(pair=pair, prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected))
    if not tokenised:
        raise DataError(
            f"none of {len(pairs)} pairs fits in max_length = {max_length} tokens. "
            "Raise reward_training.max_length, or give shorter data."
        )
    return tokenised


@dataclass(frozen=True, kw_only=True)
class PairCollator:
    """B tokenised pairs to one batch: chosen rows first, then rejected rows, right-padded."""

    statistics: ScoreStatistics
    """Of the training split; they standardise the responses' scores (Eq. 13)."""
    pad_token_id: int
    temperature: float
    """tau of the supervision target."""
    seed: int
    target_from: Literal["chosen", "diff", "both"] = "chosen"
    """Which response's scores supervise the weights."""

    def __call__(self, pairs: Sequence[TokenisedPair], step: int) -> PreferenceBatch:
        """The batch of a step; (seed, step, position) make each pair's noise seed."""
        sequences = [p.prompt_ids + p.chosen_ids for p in pairs] + [p.prompt_ids + p.rejected_ids for p in pairs]
        chosen, chosen_mask = self.statistics.standardise([p.pair.scores_chosen for p in pairs])
        rejected, rejected_mask = self.statistics.standardise([p.pair.scores_rejected for p in pairs])
        target, target_mask = supervision_target(
            *supervision_scores(chosen, chosen_mask, rejected, rejected_mask, target_from=self.target_from),
            temperature=self.temperature,
        )
        return PreferenceBatch(
            input_ids=pad_right(sequences, self.pad_token_id),
            lengths=torch.tensor([len(s) for s in sequences]),
            prompt_lengths=torch.tensor([len(p.prompt_ids) for p in pairs]),
            target=target,
            target_mask=target_mask,
            noise_seeds=torch.tensor([stable_seed("posterior", self.seed, step, b) for b in range(len(pairs))]),
            scores=torch.cat([chosen, rejected]),
            score_mask=torch.cat([chosen_mask, rejected_mask]),
            margins=torch.tensor([math.nan if p.pair.margin is None else p.pair.margin for p in pairs]),
        )


def tokenise_texts(
    texts: Sequence[tuple[tuple[Message, ...], str]], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> list[TokenisedText]:
    """Encodes (messages, response) texts for fine-tuning and drops those longer than `max_length`.

    Raises:
        DataError: nothing is left.
    """
    tokenised = []
    for messages, response in texts:
        prompt = encode_prompt(tokenizer, messages)
        text = TokenisedText(token_ids=prompt + encode_response(tokenizer, response), prompt_length=len(prompt))
        if len(text.token_ids) <= max_length:
            tokenised.append(text)
    if not tokenised:
        raise DataError(
            f"none of {len(texts)} texts fits in prepare_policy.max_length = {max_length} tokens. Raise it."
        )
    return tokenised


def pad_right(sequences: Sequence[Sequence[int]], pad_token_id: int) -> torch.Tensor:
    """[N, longest] int64."""
    width = max(len(s) for s in sequences)
    return torch.tensor([[*s, *[pad_token_id] * (width - len(s))] for s in sequences], dtype=torch.int64)
