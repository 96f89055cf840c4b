"""Which of two responses is better, with which probability, and because of which objectives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.records import RewardScore


@dataclass(frozen=True, kw_only=True)
class RewardComparison:
    """The posterior of Delta = r(x, a) - r(x, b), and the preference that follows from it."""

    log_odds: float
    """ln P(a > b) - ln P(b > a), calibrated."""
    margin: float
    """E[Delta], in units of the reward."""
    margin_std: float
    """Standard deviation of Delta."""
    contributions: tuple[float, ...]
    """What each objective adds to the margin; empty where the reward is no sum over objectives."""
    deciding: int | None
    """The objective that adds most to the preferred response's lead; None for a tie, or without objectives."""

    @property
    def probability(self) -> float:
        """P(a > b)."""
        return 0.5 * (1.0 + math.tanh(0.5 * self.log_odds))

    def is_confident(self, threshold: float | None) -> bool:
        """Whether an answer may be given (`RewardCalibration.answer_threshold`); None allows none."""
        return threshold is not None and abs(self.log_odds) > threshold


def compare_rewards(a: RewardScore, b: RewardScore) -> RewardComparison:
    """Compares the rewards of two responses a and b to one prompt.

    E[Delta]   = sum_k w_bar_k * (s_ak - s_bk)
    Var[Delta] = |u_a - u_b|^2,   u the deviations of a reward
    P(a > b)   = sigmoid( E / sqrt(T^2 + pi/8 * Var) )

    Source: docs/method.md section 7.
    """
    margin = a.mean - b.mean
    variance = max(0.0, a.std**2 + b.std**2 - 2.0 * reward_covariance(a, b))
    temperature = math.sqrt(a.temperature * b.temperature)  # of one model, and so equal
    contributions = tuple(x - y for x, y in zip(_contributions(a), _contributions(b), strict=True))
    sign = math.copysign(1.0, margin)
    has_deciding = margin != 0.0 and len(contributions) > 0
    return RewardComparison(
        log_odds=margin / math.sqrt(temperature**2 + math.pi / 8.0 * variance),
        margin=margin,
        margin_std=math.sqrt(variance),
        contributions=contributions,
        deciding=max(range(len(contributions)), key=lambda k: sign * contributions[k]) if has_deciding else None,
    )


def reward_covariance(a: RewardScore, b: RewardScore) -> float:
    """Cov[r_a, r_b] = <u_a, u_b> of the deviations; 0 where a score has none."""
    return sum(x * y for x, y in zip(a.deviations, b.deviations, strict=True))


def rank_by_lower_bound(scores: Sequence[RewardScore], *, lcb: float) -> list[tuple[int, float]]:
    """(index, mean - lcb * std) of every response, best first; equal ones stay in the order given.

    Args:
        lcb: c >= 0 standard deviations that are subtracted: an uncertain reward must be larger (docs/method.md section
            7).
    """
    bounds = [(i, score.mean - lcb * score.std) for i, score in enumerate(scores)]
    return sorted(bounds, key=lambda bound: -bound[1])


def relative_contributions(score: RewardScore, mean_contributions: Sequence[float]) -> tuple[float, ...]:
    """What each objective adds to the reward of one response above that of the mean held-out response.

    c_k = w_bar_k * s_k - m_k,   sum_k c_k = r - mean held-out reward

    w_bar_k * s_k alone is no reason: a score has no zero that means anything. Only differences do.

    Args:
        mean_contributions: [K] m_k, of a reward model's card; 0 for a model that was never evaluated.

    Returns:
        [K], or nothing where the reward is no sum over objectives.
    """
    parts = _contributions(score)
    return tuple(part - mean for part, mean in zip(parts, mean_contributions or (0.0,) * len(parts), strict=True))


def _contributions(score: RewardScore) -> list[float]:
    """[K] w_bar_k * s_k; empty where there are no objective scores."""
    return [w * s for w, s in zip(score.objective_weights, score.objective_scores, strict=bool(score.objective_scores))]
