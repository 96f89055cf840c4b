"""Which of two responses is better, with which probability, and because of which objectives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.objectives.preference import probit_preference
from pipeline.records import RewardScore


@dataclass(frozen=True, kw_only=True)
class RewardComparison:
    """The posterior of Delta = r(x, a) - r(x, b), and the preference that follows from it."""

    probability: float
    """P(a > b)."""
    margin: float
    """E[Delta], in units of the reward."""
    margin_std: float
    """Standard deviation of Delta."""
    contributions: tuple[float, ...]
    """What each objective adds to the margin; empty where the reward is no sum over objectives."""
    deciding: int | None
    """The objective that adds most to the preferred response's lead; None for a tie, or without objectives."""


def compare_rewards(a: RewardScore, b: RewardScore) -> RewardComparison:
    """Compares the rewards of two responses a and b to one prompt.

    E[Delta]   = sum_k w_bar_k * (s_ak - s_bk)
    Var[Delta] = Var[r_a] + Var[r_b] - 2 * Cov[r_a, r_b],   Cov[r_a, r_b] = s_a^T C s_b
    P(a > b)   = sigmoid( E / sqrt(1 + pi/8 * Var) )

    Source: docs/method.md section 7, for the bilinear decoder; for a network, and for an ensemble, the covariance
    is that of draws. The source writes Var[Delta] with the difference D = s_a - s_b and the sum of both feature
    covariances; this is the same number, written with what a `RewardScore` holds. Only w is shared by the two
    responses, so only C = Cov[w] correlates them.
    """
    margin = a.mean - b.mean
    variance = max(0.0, a.std**2 + b.std**2 - 2.0 * reward_covariance(a, b))
    contributions = tuple(x - y for x, y in zip(_contributions(a), _contributions(b), strict=True))
    sign = math.copysign(1.0, margin)
    has_deciding = margin != 0.0 and len(contributions) > 0
    probability = probit_preference(torch.tensor(margin, dtype=torch.float64), torch.tensor(variance))
    return RewardComparison(
        probability=float(probability),
        margin=margin,
        margin_std=math.sqrt(variance),
        contributions=contributions,
        deciding=max(range(len(contributions)), key=lambda k: sign * contributions[k]) if has_deciding else None,
    )


def reward_covariance(a: RewardScore, b: RewardScore) -> float:
    """Cov[r_a, r_b] = s_a^T C s_b,  C = (diag(w_bar) - w_bar w_bar^T) / (A + 1), the covariance of a Dirichlet.

    A prompt that had to be cut to fit its response may have been cut differently for a and b. C is then the mean of the
    two posteriors' covariances, so the result stays symmetric. It is 0 where the weights are not random.

    Where the reward is no sum over objectives, 1/2 (u_a . v_b + v_a . u_b) with the halves u and v of the deviations.
    """
    if a.deviations:
        half = len(a.deviations) // 2
        crossed = (*b.deviations[half:], *b.deviations[:half])
        return 0.5 * sum(x * y for x, y in zip(a.deviations, crossed, strict=True))
    return 0.5 * (_weight_form(a, a, b) + _weight_form(b, a, b))


def rank_by_lower_bound(scores: Sequence[RewardScore], *, lcb: float) -> list[tuple[int, float]]:
    """(index, mean - lcb * std) of every response, best first; equal ones stay in the order given.

    Args:
        lcb: c >= 0 standard deviations that are subtracted: an uncertain reward must be larger (docs/method.md section
            7).
    """
    bounds = [(i, score.mean - lcb * score.std) for i, score in enumerate(scores)]
    return sorted(bounds, key=lambda bound: -bound[1])


def _weight_form(weights_of: RewardScore, a: RewardScore, b: RewardScore) -> float:
    """s_a^T C s_b with C of one response's posterior."""
    if weights_of.concentration == 0.0 or not a.objective_scores:
        return 0.0
    w_bar = weights_of.objective_weights
    products = sum(w * s * t for w, s, t in zip(w_bar, a.objective_scores, b.objective_scores, strict=True))
    mean_a = sum(w * s for w, s in zip(w_bar, a.objective_scores, strict=True))
    mean_b = sum(w * s for w, s in zip(w_bar, b.objective_scores, strict=True))
    return (products - mean_a * mean_b) / (weights_of.concentration + 1.0)


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
