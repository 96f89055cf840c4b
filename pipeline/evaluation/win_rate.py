"""Win rates of paired scores and of the answers of two policies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.errors import ShapeError
from pipeline.records import Answer, Metrics, Prompt

if TYPE_CHECKING:
    from pipeline.data.planted import GoldAnnotator

NORMAL_QUANTILE_95 = 1.959963984540054

OPENING_WORDS = 3
"""How many first words of two answers are equal if they open alike."""


def win_rate(scores: Sequence[float], baseline_scores: Sequence[float]) -> Metrics:
    """Share of prompts on which a score exceeds the baseline's score. A tie counts one half.

    Returns:
        `win_rate`; `ties`, their share; `low` and `high` of the 95% Wilson interval (Wilson 1927). The interval stays
        inside [0, 1], and has a positive width even if every prompt is won.

    Raises:
        ShapeError: the two sequences differ in length, or are empty.
    """
    if len(scores) != len(baseline_scores) or not scores:
        raise ShapeError(
            f"win rate of {len(scores)} scores against {len(baseline_scores)}: give equally many, at least one"
        )
    return win_rate_of_preferences(
        [0.5 * (1 + (a > b) - (a < b)) for a, b in zip(scores, baseline_scores, strict=True)]
    )


def win_rate_of_preferences(preferences: Sequence[float], weights: Sequence[float] | None = None) -> Metrics:
    """Mean of win probabilities in [0, 1]; 0.5 is a tie.

    The interval is that of a binomial share. It is not too narrow, because a variable in [0, 1] with mean p has a
    variance of at most p (1 - p).

    Args:
        weights: weight of each probability; 1 if not given. The interval uses the effective number
            (sum w)^2 / sum w^2 (Kish 1965).

    Returns, Raises:
        As `win_rate`.
    """
    if not preferences:
        raise ShapeError("win rate of no preferences: give at least one")
    weights = [1.0] * len(preferences) if weights is None else weights
    total = sum(weights)
    rate = sum(w * p for w, p in zip(weights, preferences, strict=True)) / total
    ties = sum(w for w, p in zip(weights, preferences, strict=True) if p == 0.5) / total
    low, high = wilson_interval(rate, total**2 / sum(w**2 for w in weights))
    return {"win_rate": rate, "ties": ties, "low": low, "high": high}


def compare_answers(
    aligned: Sequence[Answer], base: Sequence[Answer], prompts: Sequence[Prompt], gold: GoldAnnotator | None
) -> Metrics:
    """Win rates by the reward model and, if known, by the gold annotator, with mean rewards and lengths.

    Args:
        aligned, base: answers of two policies to `prompts`, in the same order.

    Returns:
        `win_rate` of aligned against base, under `reward/` and `gold/`; the means over the prompts, `reward/`, `words/`
        and `gold/` of `aligned` and `base`; `opening/aligned` and `opening/base`, the shares of answers that begin with
        the words with which most answers of the aligned policy begin.
    """
    metrics = _prefixed("reward", win_rate([a.score.mean for a in aligned], [b.score.mean for b in base]))
    for name, answers in (("aligned", aligned), ("base", base)):
        metrics[f"reward/{name}"] = sum(a.score.mean for a in answers) / len(answers)
        metrics[f"words/{name}"] = sum(len(a.output.split()) for a in answers) / len(answers)
    metrics |= _openings([a.output for a in aligned], [b.output for b in base])
    if gold is not None:
        rewards = {
            name: [gold.reward(prompt.messages, answer.output) for prompt, answer in zip(prompts, answers, strict=True)]
            for name, answers in (("aligned", aligned), ("base", base))
        }
        metrics |= _prefixed("gold", win_rate(rewards["aligned"], rewards["base"]))
        metrics |= {f"gold/{name}": sum(values) / len(values) for name, values in rewards.items()}
    return metrics


def _openings(aligned: Sequence[str], base: Sequence[str]) -> Metrics:
    """A policy that found one answer for every prompt shows it in its first words."""
    first_words = [[tuple(text.split()[:OPENING_WORDS]) for text in texts] for texts in (aligned, base)]
    [(opening, _)] = Counter(first_words[0]).most_common(1)
    shares = [openings.count(opening) / len(openings) for openings in first_words]
    return dict(zip(("opening/aligned", "opening/base"), shares, strict=True))


def _prefixed(prefix: str, metrics: Metrics) -> Metrics:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def wilson_interval(rate: float, n: float) -> tuple[float, float]:
    """centre +- half, with centre = (p + z^2/2n) / (1 + z^2/n), half = z / (1 + z^2/n) sqrt(p(1-p)/n + z^2/4n^2)."""
    z = NORMAL_QUANTILE_95
    scale = 1.0 + z * z / n
    centre = (rate + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(rate * (1.0 - rate) / n + z * z / (4 * n * n))
    return centre - half, centre + half
