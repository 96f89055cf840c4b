"""Rollouts and their scores become the rewards of one step: a number a response, which the driver holds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from pipeline.columns import Rollouts
from pipeline.config.alignment import AlignmentConfig
from pipeline.errors import NumericsError, ShapeError
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.objectives.advantages import groups_by_size, overlong_penalty, transform_reward, uniform_groups
from pipeline.records import Metrics, RewardedRows, RewardScore


def reward_rows(
    rollouts: Rollouts, scores: Sequence[RewardScore | None], config: AlignmentConfig, reward_scale: RewardScale
) -> tuple[RewardedRows, Metrics]:
    """Shapes the rewards of the rollouts that the step learns from, and measures these rollouts.

    Args:
        rollouts, scores: B of each, in the same order: by prompt, then by sample. A rollout whose score is None is left
            out, and so is one that has no other response to compare with.
        config: its section `ppo`, and the sampler's limit.
        reward_scale: units of the reward.

    Returns:
        The rewards, and `reward/*`, `response/*` and `group/*` of these rollouts.

    Raises:
        ShapeError: not one score a rollout, or a prompt lacks samples.
        NumericsError: a score is not finite, or every rollout was left out.
    """
    require_finite(rollouts, scores)
    size = samples_per_prompt(rollouts) if config.ppo.compares_a_group else 1
    places = places_with_a_score(scores, size)
    rows = torch.tensor(places)
    mean, std = (torch.tensor(column) for column in _means_and_stds(scores, places))
    was_cut = torch.tensor([rollouts.finish_reasons[row] == "length" for row in places], dtype=torch.float32)
    lengths = rollouts.response_ids.lengths[rows]
    rewards = shaped_rewards(mean, std, was_cut, lengths, config, reward_scale)
    rewarded = RewardedRows(rows=rows, rewards=rewards, groups=rows // size)
    repetition = torch.tensor([rollouts.repetition[row] for row in places], dtype=torch.float32)
    metrics = {
        "reward/mean": float(mean.mean()),
        "reward/std_over_batch": float(mean.std(correction=0)),
        "reward/posterior_std": float(std.mean()),
        "reward/shaped": float(rewards.mean()),
        "response/tokens": float(lengths.float().mean()),
        "response/stopped": float(1.0 - was_cut.mean()),
        "response/repetition": float(repetition.mean()),
    }
    if config.ppo.compares_a_group:
        num_scored = sum(score is not None for score in scores)
        metrics |= group_metrics(rewards, rewarded.groups) | {"group/alone": float(num_scored - len(rows))}
    return rewarded, metrics


def shaped_rewards(
    mean: torch.Tensor,
    std: torch.Tensor,
    was_cut: torch.Tensor,
    lengths: torch.Tensor,
    config: AlignmentConfig,
    reward_scale: RewardScale,
) -> torch.Tensor:
    """r~ = transform(r) - p_eos 1[cut] + R_length(|y|), [B]; the last term only where the recipe has a buffer.

    p_eos is the penalty of a response that was cut at the sampler's limit, R_length that of one that ends close to it.

    Source: `transform_reward` and `overlong_penalty`; p_eos as TRL's `missing_eos_penalty`.

    Args:
        mean, std: [B] posterior mean and standard deviation of the reward r.
        was_cut: [B] 1 where the response reached the sampler's limit before its end, else 0.
        lengths: [B] response tokens |y|.
    """
    ppo = config.ppo
    rewards = transform_reward(
        mean,
        std,
        ppo.reward_transform,
        reward_mean=reward_scale.mean,
        reward_std=reward_scale.std,
        posterior_std=reward_scale.posterior_std,
        lcb_coefficient=ppo.lcb_coefficient,
        clip=ppo.reward_clip,
    )
    rewards = rewards - ppo.missing_eos_penalty * was_cut
    if ppo.overlong_buffer == 0:
        return rewards
    limit = config.max_response_tokens
    return rewards + overlong_penalty(lengths, max_tokens=limit, buffer_tokens=ppo.overlong_buffer * limit)


def group_metrics(rewards: torch.Tensor, groups: torch.Tensor) -> Metrics:
    """`group/*` of [B] shaped rewards: their spread within a prompt, and the share of prompts without any."""
    tables = [rewards[rows] for rows in groups_by_size(groups)]
    return {
        "group/reward_std": float(torch.cat([table.std(-1) for table in tables]).mean()),
        "group/uniform": float(torch.cat([uniform_groups(table) for table in tables]).float().mean()),
    }


def places_with_a_score(scores: Sequence[RewardScore | None], size: int) -> list[int]:
    """Places of the scores; in groups of a `size` above 1 only those that have another of their group beside them.

    Raises:
        NumericsError: there is none.
    """
    with_score = [row for row, score in enumerate(scores) if score is not None]
    members = Counter(row // size for row in with_score)
    places = [row for row in with_score if size == 1 or members[row // size] > 1]
    if not places:
        raise NumericsError(
            f"of {len(scores)} rollouts {len(with_score)} have a reward, and none of them another response to its "
            "prompt to be compared with. Mend the reward that fails, or give it a fixed score (alignment.rewards: "
            "on_failure)."
        )
    return places


def _means_and_stds(scores: Sequence[RewardScore | None], places: Sequence[int]) -> tuple[list[float], list[float]]:
    found = [score for row in places if (score := scores[row]) is not None]
    return [score.mean for score in found], [score.std for score in found]


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


# ------------------------------------------------------------------ numbers that are none


def require_finite(rollouts: Rollouts, scores: Sequence[RewardScore | None]) -> None:
    """Finds a reward that is no number while its rollout still has a name.

    Raises:
        ShapeError: not one score a rollout, or no rollout.
        NumericsError: a score is not finite.
    """
    if not len(rollouts) == len(scores) > 0:
        raise ShapeError(f"{len(rollouts)} rollouts and {len(scores)} scores")
    for row, score in enumerate(scores):
        if score is not None and not (math.isfinite(score.mean) and math.isfinite(score.std)):
            refuse_not_finite(rollouts, row, "reward mean and std", (score.mean, score.std))


def refuse_not_finite(rollouts: Rollouts, row: int, what: str, numbers: Sequence[float]) -> None:
    """Raises NumericsError where some of the numbers of a rollout are not finite."""
    not_finite = [number for number in numbers if not math.isfinite(number)]
    if not_finite:
        raise NumericsError(
            f"{name_of(rollouts, row)}: {len(not_finite)} of {len(numbers)} {what} are not finite (first "
            f"{not_finite[0]}), so nothing was trained on this batch. The response begins "
            f"{rollouts.response_texts[row][:80]!r}."
        )


def name_of(rollouts: Rollouts, row: int) -> str:
    """A rollout, as messages name it."""
    return f"prompt {rollouts.prompts[row].id!r}, sample {rollouts.sample_indices[row]}"
