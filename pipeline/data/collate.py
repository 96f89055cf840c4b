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
from pipeline.data.planted import GoldAnnotator
from pipeline.data.score_statistics import MixtureStatistics
from pipeline.data.token_limit import require_enough_fit
from pipeline.objectives.variational import supervision_scores, supervision_target
from pipeline.records import Message, ObjectiveTruth, PreferenceBatch, PreferencePair, PromptGroup


@dataclass(frozen=True, kw_only=True)
class TokenisedPair:
    """A pair in words and in the reward model's tokens."""

    pair: PreferencePair
    tokens: PromptGroup
    """The chosen, then the rejected response."""


def tokenise_pairs(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    drop_too_long: bool,
    max_too_long: float = 1.0,
) -> list[TokenisedPair]:
    """Encodes pairs. Training drops those longer than `max_length`; evaluation cuts the prompt from the left instead.

    Args:
        max_too_long: share of the pairs that may be dropped.

    Raises:
        DataError: nothing is left, or too little.
    """
    tokenised, lengths = [], []
    for pair in pairs:
        prompt = encode_prompt(tokenizer, pair.prompt)
        chosen, rejected = (encode_response(tokenizer, strip_thinking(text)) for text in (pair.chosen, pair.rejected))
        longest = max(len(chosen), len(rejected))
        lengths.append(len(prompt) + longest)
        if lengths[-1] > max_length:
            if drop_too_long or longest >= max_length:
                continue
            prompt = fit_prompt(prompt, max(chosen, rejected, key=len), max_length)
        tokens = PromptGroup(prompt_ids=prompt, response_ids=(chosen, rejected))
        tokenised.append(TokenisedPair(pair=pair, tokens=tokens))
    limit = f"reward.max_length = {max_length}"
    require_enough_fit(lengths, len(tokenised), kind="pairs", limit=limit, max_too_long=max_too_long)
    return tokenised


@dataclass(frozen=True, kw_only=True)
class PairCollator:
    """B tokenised pairs to one batch."""

    statistics: MixtureStatistics
    """Score statistics of the training split, by source. They standardise the responses' scores (Eq. 13)."""
    temperature: float
    """tau of the supervision target."""
    seed: int
    target_from: Literal["chosen", "diff", "both"] = "chosen"
    """Which response's scores supervise the weights."""

    def __call__(self, pairs: Sequence[TokenisedPair], step: int) -> PreferenceBatch:
        """The batch of a step; (seed, step, position) make each pair's noise seed."""
        sources = tuple(p.pair.source for p in pairs)
        chosen, chosen_mask = self.statistics.standardise([p.pair.scores_chosen for p in pairs], sources)
        rejected, rejected_mask = self.statistics.standardise([p.pair.scores_rejected for p in pairs], sources)
        target, target_mask = supervision_target(
            *supervision_scores(chosen, chosen_mask, rejected, rejected_mask, target_from=self.target_from),
            temperature=self.temperature,
        )
        return PreferenceBatch(
            pairs=tuple(p.tokens for p in pairs),
            target=target,
            target_mask=target_mask,
            noise_seeds=torch.tensor([stable_seed("posterior", self.seed, step, b) for b in range(len(pairs))]),
            scores=torch.cat([chosen, rejected]),
            score_mask=torch.cat([chosen_mask, rejected_mask]),
            margins=torch.tensor([math.nan if p.pair.margin is None else p.pair.margin for p in pairs]),
            sources=sources,
        )


def tokenise_texts(
    texts: Sequence[tuple[tuple[Message, ...], str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_too_long: float = 1.0,
) -> list[PromptGroup]:
    """Encodes (messages, response) texts for fine-tuning and drops those longer than `max_length`.

    Args:
        max_too_long: share of the texts that may be dropped.

    Raises:
        DataError: nothing is left, or too little.
    """
    tokenised, lengths = [], []
    for messages, response in texts:
        text = PromptGroup(
            prompt_ids=encode_prompt(tokenizer, messages), response_ids=(encode_response(tokenizer, response),)
        )
        lengths.append(text.num_tokens)
        if text.num_tokens <= max_length:
            tokenised.append(text)
    limit = f"sft.max_length = {max_length}"
    require_enough_fit(lengths, len(tokenised), kind="texts", limit=limit, max_too_long=max_too_long)
    return tokenised


def objective_truth(gold: GoldAnnotator, pairs: Sequence[PreferencePair], objectives: Sequence[str]) -> ObjectiveTruth:
    """The true weights of each pair's prompt and the true scores of its responses.

    Raises:
        DataError: a prompt is not of the planted world.
    """
    weights = [gold.objective_weights(pair.prompt) for pair in pairs]
    scores = [
        gold.objective_scores(pair.prompt, response)
        for responses in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
        for pair, response in zip(pairs, responses, strict=True)
    ]
    return ObjectiveTruth(
        weights=torch.tensor([[row[name] for name in objectives] for row in weights], dtype=torch.float64),
        scores=torch.tensor([[row[name] for name in objectives] for row in scores], dtype=torch.float64),
    )
