"""The rollouts of one step as tensors, with what the reward model and the learner said of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.errors import NumericsError, ShapeError
from pipeline.records import RewardScore, Rollout, TokenEvaluation

REPEATED_NGRAM = 4
"""Tokens. Shorter runs of tokens occur twice in good prose."""


@dataclass(frozen=True, kw_only=True)
class RolloutTensors:
    """B responses of T tokens at most, left-aligned; 0 on padding. Rows are ordered by prompt, then by sample."""

    mask: torch.Tensor
    """[B, T] bool, True on response tokens."""
    logprobs: torch.Tensor
    """[B, T] under the policy before the update, nats."""
    reference_logprobs: torch.Tensor
    """[B, T] under the frozen reference, nats."""
    engine_logprobs: torch.Tensor
    """[B, T] under the engine that sampled the token, nats."""
    values: torch.Tensor
    """[B, T] under the critic before the update."""
    response_lengths: torch.Tensor
    """[B] int64 tokens."""
    was_cut: torch.Tensor
    """[B] float32: 1 where the response reached the sampler's limit before its end, else 0."""
    repetition: torch.Tensor
    """[B] float32: share of the response's 4-grams of tokens that have occurred in it before."""
    reward_mean: torch.Tensor
    """[B] posterior mean of the reward."""
    reward_std: torch.Tensor
    """[B] posterior standard deviation of the reward."""

    @classmethod
    def of(
        cls, rollouts: Sequence[Rollout], scores: Sequence[RewardScore], evaluations: Sequence[TokenEvaluation]
    ) -> RolloutTensors:
        """Pads B rollouts, with B scores and B evaluations in the same order.

        Raises:
            ShapeError: the three lists, or the tokens of one rollout, do not fit each other.
            NumericsError: a score or an evaluation is not finite.
        """
        _require_usable(rollouts, scores, evaluations)
        lengths = torch.tensor([len(rollout.response_ids) for rollout in rollouts])
        return cls(
            mask=torch.arange(int(lengths.max())) < lengths.unsqueeze(-1),
            logprobs=_pad([evaluation.logprobs for evaluation in evaluations]),
            reference_logprobs=_pad([evaluation.reference_logprobs for evaluation in evaluations]),
            engine_logprobs=_pad([rollout.logprobs for rollout in rollouts]),
            values=_pad([evaluation.values for evaluation in evaluations]),
            response_lengths=lengths,
            was_cut=torch.tensor([r.finish_reason == "length" for r in rollouts], dtype=torch.float32),
            repetition=torch.tensor([repeated_share(rollout.response_ids) for rollout in rollouts]),
            reward_mean=torch.tensor([score.mean for score in scores]),
            reward_std=torch.tensor([score.std for score in scores]),
        )


def samples_per_prompt(rollouts: Sequence[Rollout]) -> int:
    """G, where the rollouts are G samples of one prompt, then G of the next.

    Raises:
        ShapeError: a prompt lacks samples, or the order is another.
    """
    size = 1 + max(rollout.sample_index for rollout in rollouts)
    if [rollout.sample_index for rollout in rollouts] != [*range(size)] * (len(rollouts) // size):
        counts = Counter(rollout.prompt.id for rollout in rollouts).most_common()
        (most_id, most), (fewest_id, fewest) = counts[0], counts[-1]
        raise ShapeError(
            f"{len(rollouts)} rollouts are not whole groups of samples 0 to {size - 1}, ordered by prompt: "
            f"{most_id!r} has {most}, {fewest_id!r} has {fewest}. Group advantages need every sample of every prompt."
        )
    return size


def _require_usable(
    rollouts: Sequence[Rollout], scores: Sequence[RewardScore], evaluations: Sequence[TokenEvaluation]
) -> None:
    """Finds a bad row while it still has a name; later it would be a gradient that is NaN."""
    if not len(rollouts) == len(scores) == len(evaluations) > 0:
        raise ShapeError(f"{len(rollouts)} rollouts, {len(scores)} scores and {len(evaluations)} evaluations")
    for rollout, score, evaluation in zip(rollouts, scores, evaluations, strict=True):
        name = f"prompt {rollout.prompt.id!r}, sample {rollout.sample_index}"
        lengths = {
            "response tokens": len(rollout.response_ids),
            "engine logprobs": len(rollout.logprobs),
            "learner logprobs": len(evaluation.logprobs),
            "reference logprobs": len(evaluation.reference_logprobs),
            "values": len(evaluation.values),
        }
        if len(set(lengths.values())) > 1 or not rollout.response_ids:
            raise ShapeError(f"{name}: " + ", ".join(f"{length} {what}" for what, length in lengths.items()))
        numbers = {
            "reward mean and std": (score.mean, score.std),
            "engine logprobs": rollout.logprobs,
            "learner logprobs": evaluation.logprobs,
            "reference logprobs": evaluation.reference_logprobs,
            "values": evaluation.values,
        }
        for what, row in numbers.items():
            not_finite = [number for number in row if not math.isfinite(number)]
            if not_finite:
                raise NumericsError(
                    f"{name}: {len(not_finite)} of {len(row)} {what} are not finite (first {not_finite[0]}), so "
                    f"nothing was trained on this batch. The response begins {rollout.response_text[:80]!r}."
                )


def _pad(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    """[B, T] float32, left-aligned, 0 on padding."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float32)


def repeated_share(tokens: Sequence[int]) -> float:
    """Share of a response's 4-grams that have occurred in it before; 0 for a response of fewer than 4 tokens."""
    count = len(tokens) - REPEATED_NGRAM + 1
    if count <= 0:
        return 0.0
    distinct = {tuple(tokens[i : i + REPEATED_NGRAM]) for i in range(count)}
    return 1.0 - len(distinct) / count
