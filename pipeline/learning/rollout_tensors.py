"""The rollouts of one step as tensors, with what the reward model and the learner said of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.columns import Rollouts, TokenEvaluations
from pipeline.errors import NumericsError, ShapeError
from pipeline.records import RewardScore, Rollout, TokenEvaluation
from pipeline.rollouts.repetition import repeated_shares


@dataclass(frozen=True, kw_only=True)
class RolloutTensors:
    """B responses with N tokens in all, end to end. Rows are ordered by prompt, then by sample."""

    offsets: torch.Tensor
    """[B + 1] int64: response b has the tokens from `offsets[b]` to `offsets[b + 1]`, one at least."""
    logprobs: torch.Tensor
    """[N] under the policy before the update, nats."""
    reference_logprobs: torch.Tensor
    """[N] under the frozen reference, nats."""
    engine_logprobs: torch.Tensor
    """[N] under the engine that sampled the token, nats."""
    values: torch.Tensor
    """[N] under the critic before the update."""
    was_cut: torch.Tensor
    """[B] float32: 1 where the response reached the sampler's limit before its end, else 0."""
    repetition: torch.Tensor
    """[B] float32: share of the response's 4-grams of tokens that have occurred in it before."""
    reward_mean: torch.Tensor
    """[B] posterior mean of the reward."""
    reward_std: torch.Tensor
    """[B] posterior standard deviation of the reward."""

    @classmethod
    def of(cls, rollouts: Rollouts, scores: Sequence[RewardScore], evaluations: TokenEvaluations) -> RolloutTensors:
        """Of B rollouts, B scores and B evaluations in the same order; shares the memory of their tokens.

        Raises:
            ShapeError: the three, or the tokens of one rollout, do not fit each other.
            NumericsError: a score or an evaluation is not finite.
        """
        _require_usable(rollouts, scores, evaluations)
        return cls(
            offsets=rollouts.response_ids.offsets,
            logprobs=evaluations.logprobs.values,
            reference_logprobs=evaluations.reference_logprobs.values,
            engine_logprobs=rollouts.logprobs.values,
            values=evaluations.values.values,
            was_cut=torch.tensor([reason == "length" for reason in rollouts.finish_reasons], dtype=torch.float32),
            repetition=torch.from_numpy(repeated_shares(rollouts.response_ids)).float(),
            reward_mean=torch.tensor([score.mean for score in scores]),
            reward_std=torch.tensor([score.std for score in scores]),
        )

    @property
    def response_lengths(self) -> torch.Tensor:
        """[B] int64 tokens."""
        return self.offsets.diff()


def samples_per_prompt(rollouts: Rollouts) -> int:
    """G, where the rollouts are G samples of one prompt, then G of the next.

    Raises:
        ShapeError: a prompt lacks samples, or the order is another.
    """
    size = 1 + max(rollouts.sample_indices)
    if rollouts.sample_indices != (*range(size),) * (len(rollouts) // size):
        counts = Counter(prompt.id for prompt in rollouts.prompts).most_common()
        (most_id, most), (fewest_id, fewest) = counts[0], counts[-1]
        raise ShapeError(
            f"{len(rollouts)} rollouts are not whole groups of samples 0 to {size - 1}, ordered by prompt: "
            f"{most_id!r} has {most}, {fewest_id!r} has {fewest}. Group advantages need every sample of every prompt."
        )
    return size


def _require_usable(rollouts: Rollouts, scores: Sequence[RewardScore], evaluations: TokenEvaluations) -> None:
    """Finds a bad row while it still has a name; later it would be a gradient that is NaN."""
    if not len(rollouts) == len(scores) == len(evaluations) > 0:
        raise ShapeError(f"{len(rollouts)} rollouts, {len(scores)} scores and {len(evaluations)} evaluations")
    columns = (rollouts.logprobs, evaluations.logprobs, evaluations.reference_logprobs, evaluations.values)
    offsets = rollouts.response_ids.offsets
    is_usable = (
        bool((offsets.diff() > 0).all())
        and all(torch.equal(column.offsets, offsets) for column in columns)
        and all(_all_finite(column.values) for column in columns)
        and all(math.isfinite(score.mean) and math.isfinite(score.std) for score in scores)
    )
    if not is_usable:
        for row in zip(rollouts, scores, evaluations, strict=True):
            _require_usable_row(*row)


def _all_finite(values: torch.Tensor) -> bool:
    # A float64 cannot overflow by adding float32, so the sum is finite where all numbers are. It needs no memory.
    return math.isfinite(np.add.reduce(values.numpy(), dtype=np.float64))


def _require_usable_row(rollout: Rollout, score: RewardScore, evaluation: TokenEvaluation) -> None:
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
