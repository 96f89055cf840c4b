"""Upper bounds on the risk of a ranker: PAC-Bayes on its training pairs, Clopper-Pearson on held-out ones.

Source: VRM, arXiv 2603.04974, Eqs. 15-20; equation numbers are the paper's. All bounds have one form
(that of Germain et al. 2009, "PAC-Bayesian learning of linear classifiers"). With probability 1 - delta over n
pairs, for all posteriors Q at once,

    distance(R_hat(Q), R(Q)) <= ( D(Q||P) + c(n, delta) ) / m(n)

so the bound on R(Q) inverts the distance, and the D(Q||P) a bound can afford is m * distance - c.

Risks are shares of wrongly ordered pairs, in [0, 1]; a tie is an error (Eq. 15). D is in nats and a total over the n
pairs (Eq. 20), not a mean. A coin that ignores both responses has risk 1/2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.errors import NumericsError

HALVINGS = 60
"""How often [0, 1] is halved: the bracket is then below the rounding of a double."""

LARGEST_N = 2**62


@dataclass(frozen=True, kw_only=True)
class PacBayesBound:
    """One bound of the common form."""

    distance: Callable[[float, float], float]
    """(R_hat, R) to a number that grows with R above R_hat."""
    inverse: Callable[[float, float], float]
    """(R_hat, b) to sup { R : distance(R_hat, R) <= b }; above 1 where the distance does not know that R <= 1."""
    confidence: Callable[[int, float], float]
    """c(n, delta), nats: what certainty 1 - delta costs."""
    scale: Callable[[int], float]
    """m(n), by which the divergence and the confidence are divided."""


def binary_kl(q: float, p: float) -> float:
    """kl(q||p) = q ln(q/p) + (1-q) ln((1-q)/(1-p)), the divergence of two coins, nats."""
    if (p == 0.0 and q > 0.0) or (p == 1.0 and q < 1.0):
        return math.inf
    heads = q * math.log(q / p) if q > 0.0 else 0.0
    tails = (1.0 - q) * math.log((1.0 - q) / (1.0 - p)) if q < 1.0 else 0.0
    return heads + tails


def binary_kl_inverse(q: float, budget: float) -> float:
    """sup { p in [q, 1] : kl(q||p) <= budget }, by bisection; budget >= 0 nats."""
    return _last_true(lambda p: binary_kl(q, p) <= budget, q, 1.0)


def squared_distance(q: float, p: float) -> float:
    """(p - q)^2, McAllester's distance of two risks."""
    return (p - q) ** 2


def squared_distance_inverse(q: float, budget: float) -> float:
    """sup { p : (p - q)^2 <= budget }; may exceed 1."""
    return q + math.sqrt(budget)


BOUNDS: Mapping[str, PacBayesBound] = {
    # McAllester 1999, "PAC-Bayesian model averaging": the paper's Eq. 19.
    # R <= R_hat + sqrt( (D + ln 1/delta + 5/2 ln n + 8) / (2n - 1) )
    "mcallester99": PacBayesBound(
        distance=squared_distance,
        inverse=squared_distance_inverse,
        confidence=lambda n, delta: math.log(1.0 / delta) + 2.5 * math.log(n) + 8.0,
        scale=lambda n: 2.0 * n - 1.0,
    ),
    # McAllester 2003, "PAC-Bayesian stochastic model selection".
    # R <= R_hat + sqrt( (D + ln 1/delta + ln n + 2) / (2n - 1) )
    "mcallester03": PacBayesBound(
        distance=squared_distance,
        inverse=squared_distance_inverse,
        confidence=lambda n, delta: math.log(1.0 / delta) + math.log(n) + 2.0,
        scale=lambda n: 2.0 * n - 1.0,
    ),
    # Seeger 2002 with the constant of Maurer 2004, arXiv:cs/0411099: the tightest of the three.
    # kl(R_hat||R) <= (D + ln( 2 sqrt(n) / delta )) / n
    "kl_inverse": PacBayesBound(
        distance=binary_kl,
        inverse=binary_kl_inverse,
        confidence=lambda n, delta: math.log(2.0 * math.sqrt(n) / delta),
        scale=float,
    ),
}


def risk_bound(bound: PacBayesBound, empirical_risk: float, kl: float, n: int, delta: float) -> float:
    """The bound on R(Q), Eq. 19: not clipped, so that a value above 1 shows how far it is from saying anything.

    Args:
        empirical_risk: R_hat(Q), Eq. 18.
        kl: D(Q||P), Eq. 20, nats over all n pairs.
        n: training pairs.
        delta: in (0, 1); the bound holds with probability 1 - delta.

    Raises:
        NumericsError: an argument outside its range; a bound made from it would look like one.
    """
    _require(0.0 <= empirical_risk <= 1.0, "empirical risk", empirical_risk, "in [0, 1]")
    _require(0.0 <= kl < math.inf, "D(Q||P)", kl, "finite and not negative")
    _require_sample(n, delta)
    return bound.inverse(empirical_risk, (kl + bound.confidence(n, delta)) / bound.scale(n))


def largest_kl(bound: PacBayesBound, empirical_risk: float, n: int, delta: float, *, level: float) -> float:
    """The D(Q||P) up to which the bound stays below `level`: m * distance(R_hat, level) - c, nats over all n pairs.

    Infinite for kl_inverse at level 1, which it never reaches; negative where not even Q = P would do.
    """
    _require_sample(n, delta)
    if empirical_risk >= level:
        return -math.inf
    return bound.scale(n) * bound.distance(empirical_risk, level) - bound.confidence(n, delta)


def smallest_n(
    bound: PacBayesBound, empirical_risk: float, kl_per_pair: float, delta: float, *, level: float
) -> int | None:
    """The training pairs from which the bound is below `level`, were R_hat and D/n to stay what they are.

    D is a sum over the pairs, so D/n does not shrink with n: None when no n is enough.
    """

    def is_enough(n: int) -> bool:
        return kl_per_pair * n < largest_kl(bound, empirical_risk, n, delta, level=level)

    # What is left of the budget is convex in n and negative at its start, or positive throughout: one crossing.
    high = 1
    while not is_enough(high):
        if high >= LARGEST_N:
            return None
        high *= 2
    low = high // 2  # not enough, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def clopper_pearson_upper(errors: int, n: int, delta: float) -> float:
    """sup { p : P( Binomial(n, p) <= errors ) >= delta }: the exact upper bound on a risk from n independent pairs.

    Source: Clopper and Pearson 1934, one-sided. It holds with probability 1 - delta for a ranker that was fixed before
    these pairs were looked at.

    Raises:
        NumericsError: more errors than pairs, or delta outside (0, 1).
    """
    _require(0 <= errors <= n, f"errors among {n} pairs", errors, f"between 0 and {n}")
    _require_sample(n, delta)
    if errors == n:
        return 1.0
    k = np.arange(errors + 1.0)
    log_choose = np.concatenate([[0.0], np.cumsum(np.log(n - k[:-1]) - np.log(k[1:]))])

    def log_tail(p: float) -> float:
        return float(np.logaddexp.reduce(log_choose + k * math.log(p) + (n - k) * math.log1p(-p)))

    return _last_true(lambda p: p == 0.0 or (p < 1.0 and log_tail(p) >= math.log(delta)), 0.0, 1.0)


def _last_true(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The point where a predicate that is true at `low` turns false; rounded up, for it serves as an upper bound."""
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high


def _require_sample(n: int, delta: float) -> None:
    _require(n >= 1, "number of pairs", n, "at least 1")
    _require(0.0 < delta < 1.0, "delta", delta, "between 0 and 1")


def _require(holds: bool, name: str, value: float, expected: str) -> None:
    if not holds:
        raise NumericsError(f"{name} = {value} must be {expected}; a bound computed from it would mean nothing")
