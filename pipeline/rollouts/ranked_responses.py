"""From n scored responses to a prompt to a pair, or to the best response: what a policy learns of its own samples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import DataError, NumericsError, ShapeError
from pipeline.objectives.reward_comparison import rank_by_lower_bound
from pipeline.records import Metrics, RewardScore, Rollout

ALIKE, TOO_CLOSE, UNFINISHED = "all responses score alike", "best and worst too close", "no response finished"


@dataclass(frozen=True, kw_only=True)
class RankedResponses:
    """The best and the worst response to one prompt."""

    best: Rollout
    worst: Rollout
    margin: float
    """By how much the best one scores higher, in units of the reward."""


@dataclass(frozen=True, kw_only=True)
class RankedSamples:
    """The prompts of a round that teach something, and what was left out."""

    rows: tuple[RankedResponses, ...]
    left_out: Mapping[str, int]
    """Prompts without a row, by reason."""

    def metrics(self) -> Metrics:
        """Counts, the mean margin, and the lengths of both sides: a reward that likes length shows here."""
        counts = {f"pairs/left_out/{reason.replace(' ', '_')}": float(n) for reason, n in self.left_out.items()}
        num_rows = len(self.rows)
        return counts | {
            "pairs/rows": float(num_rows),
            "pairs/margin": sum(row.margin for row in self.rows) / num_rows,
            "pairs/best_tokens": sum(len(row.best.response_ids) for row in self.rows) / num_rows,
            "pairs/worst_tokens": sum(len(row.worst.response_ids) for row in self.rows) / num_rows,
        }


def rank_samples(
    samples: Sequence[Rollout],
    scores: Sequence[RewardScore],
    *,
    samples_per_prompt: int,
    lcb_coefficient: float,
    least_margin: float,
) -> RankedSamples:
    """The best response to each prompt against the worst.

    Responses are ranked by mean - c * std, so an uncertain reward must be larger to win (docs/method.md section 7).
    The best is chosen among responses with words that ended by themselves: an empty one, or one cut at the length
    limit, may lose, never win.

    Source: best against worst of n as in Yuan et al. 2024, arXiv:2401.10020, and Dong et al. 2024, arXiv:2405.07863
    (online-iterative DPO). The best alone is what RAFT trains on (Dong et al. 2023, arXiv:2304.06767).

    Args:
        samples: `samples_per_prompt` rollouts per prompt, in the order of `RolloutSource.generate`.
        scores: one for each sample.
        lcb_coefficient: c >= 0.
        least_margin: pairs whose best and worst lie nearer, in units of the reward, are left out.

    Returns:
        The rows in the order of the prompts. Prompts whose responses teach nothing are left out and counted.

    Raises:
        ShapeError: samples and scores do not fit each other.
        NumericsError: a score is not finite.
        DataError: no prompt is left.
    """
    rows: list[RankedResponses] = []
    left_out: Counter[str] = Counter()
    for group, group_scores in _by_prompt(samples, scores, samples_per_prompt):
        found = _ranked(group, group_scores, lcb_coefficient, least_margin)
        if isinstance(found, str):
            left_out[found] += 1
        else:
            rows.append(found)
    if not rows:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in left_out.items())
        raise DataError(
            f"none of {left_out.total()} prompts gives a pair: {reasons or 'there is none'}. Sample more responses a "
            "prompt (alignment.samples_per_prompt), at a higher temperature or with more room "
            "(alignment.max_response_tokens), or lower alignment.policy_pairs.least_margin."
        )
    return RankedSamples(rows=tuple(rows), left_out=left_out)


def _by_prompt(
    samples: Sequence[Rollout], scores: Sequence[RewardScore], size: int
) -> Iterator[tuple[Sequence[Rollout], Sequence[RewardScore]]]:
    if len(samples) != len(scores) or len(samples) % size:
        raise ShapeError(f"{len(samples)} samples and {len(scores)} scores, of {size} a prompt: give whole groups")
    for first in range(0, len(samples), size):
        group = list(samples[first : first + size])
        if len({sample.prompt.id for sample in group}) > 1:
            raise ShapeError(f"samples {first} to {first + size - 1} answer different prompts: give them in order")
        yield group, scores[first : first + size]


def _ranked(
    group: Sequence[Rollout], scores: Sequence[RewardScore], lcb_coefficient: float, least_margin: float
) -> RankedResponses | str:
    """The row of a prompt, or why there is none."""
    ranking = rank_by_lower_bound(scores, lcb=lcb_coefficient)
    if not all(math.isfinite(bound) for _, bound in ranking):
        raise NumericsError(
            f"a response to the prompt {group[0].prompt.id!r} has a reward that is not finite. Nothing can be ranked "
            "by it; look at the reward model."
        )
    worst, lowest = ranking[-1]
    if ranking[0][1] == lowest:
        return ALIKE
    finished = [
        (row, bound)
        for row, bound in ranking
        if group[row].finish_reason == "stop" and group[row].response_text.strip()
    ]
    if not finished:
        return UNFINISHED
    best, highest = finished[0]
    margin = highest - lowest
    if margin <= 0.0 or margin < least_margin:
        return TOO_CLOSE
    return RankedResponses(best=group[best], worst=group[worst], margin=margin)
