"""Win rates of policies over each other, with the length and markdown of their answers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pipeline.benchmark.policy_comparison.contest import Contest, length_and_markdown, mean, num_words
from pipeline.benchmark.policy_comparison.verdicts import Pair, Verdicts
from pipeline.evaluation.win_rate import NORMAL_QUANTILE_95, win_rate_of_preferences
from pipeline.records import Metrics

ABOUT_AS_LONG = 0.1
"""Two answers are about equally long if the longer one has at most a tenth more words."""


def win_matrix(contest: Contest, verdicts: Verdicts) -> dict[str, dict[str, Metrics]]:
    """matrix[a][b]: win rate of a over b on all prompts with a verdict; no entry for a pair that was not judged."""
    all_prompts = range(len(contest.prompts))
    return {
        a: {
            b: head_to_head(contest, verdicts, (a, b), all_prompts)
            for b in contest.policies
            if (a, b) in verdicts.pairs
        }
        for a in contest.policies
    }


def head_to_head(contest: Contest, verdicts: Verdicts, pair: Pair, prompts: Sequence[int]) -> Metrics:
    """Win rate of the first policy of the pair over the second, with the differences in length and markdown.

    Returns:
        `n`: number of prompts with a verdict; `win_rate`, `ties`, `low`, `high` of `win_rate_of_preferences`;
        `identical`: number of those prompts to which both gave the same answer; `own_words` and `other_words` per
        answer; `words` and `markdown`: how many more per answer the first policy has, over the same prompts. Without
        any verdict, only `n` = 0.
    """
    policy, other = pair
    decided = [i for i in prompts if verdicts.pairs[pair][i] is not None]
    if not decided:
        return {"n": 0.0}
    first, second = ([length_and_markdown(contest.outputs[name][i]) for i in decided] for name in (policy, other))
    return {
        "n": float(len(decided)),
        **win_rate_of_preferences(
            [p for i in decided if (p := verdicts.pairs[pair][i]) is not None],
            [verdicts.weights[pair][i] for i in decided],
        ),
        "identical": float(sum(contest.outputs[policy][i] == contest.outputs[other][i] for i in decided)),
        "own_words": mean([a.words for a in first]),
        "other_words": mean([b.words for b in second]),
        "words": mean([a.words - b.words for a, b in zip(first, second, strict=True)]),
        "markdown": mean([sum(a[1:]) - sum(b[1:]) for a, b in zip(first, second, strict=True)]),
    }


def difference_over_shared_opponent(verdicts: Verdicts, pair: Pair) -> tuple[str, Metrics] | None:
    """The difference in win rate of two policies that the judge compared only with a third policy.

    D = P_a - P_b over the prompts where both have a verdict, P_a = sum_i w_i p_i / sum_i w_i;
    D +- 1.96 sd(d) / sqrt(n),  d_i = w_ai (p_ai - P_a) / mean(w_a) - w_bi (p_bi - P_b) / mean(w_b)

    The sample is one of prompts, each with both verdicts, so the difficulty of a prompt cancels. The interval is that
    of the delta method for a difference of two ratios.

    Returns:
        The third policy, and `difference`, `low`, `high` in [-1, 1]; None if there is no such policy, or there are
        fewer than two prompts.
    """
    a, b = pair
    opponents = [other for policy, other in verdicts.pairs if policy == a and (b, other) in verdicts.pairs]
    if not opponents:
        return None
    rows = [
        (p_a, w_a, p_b, w_b)
        for p_a, w_a, p_b, w_b in zip(
            *(of_pair[policy, opponents[0]] for policy in pair for of_pair in (verdicts.pairs, verdicts.weights)),
            strict=True,
        )
        if p_a is not None and p_b is not None
    ]
    if len(rows) < 2:
        return None
    p, w = (np.array([row[i::2] for row in rows], dtype=float) for i in (0, 1))  # [n, 2] each
    rates = (w * p).sum(axis=0) / w.sum(axis=0)
    influence = (w * (p - rates) / w.mean(axis=0)) @ np.array([1.0, -1.0])
    difference = float(rates[0] - rates[1])
    half = NORMAL_QUANTILE_95 * float(influence.std(ddof=1)) / math.sqrt(len(rows))
    return opponents[0], {"difference": difference, "low": difference - half, "high": difference + half}


def breakdown(contest: Contest, verdicts: Verdicts, pair: Pair) -> list[tuple[str, Metrics]]:
    """(group of prompts, `head_to_head` on it): all prompts, each category if there are several, and by length.

    A policy that wins where its answers are longer, and loses where they are shorter, wins by length alone.
    """
    all_prompts = range(len(contest.prompts))
    groups: dict[str, Sequence[int]] = {"all prompts": all_prompts}
    if len(set(contest.categories)) > 1:
        for category in sorted(set(contest.categories)):
            groups[category or "no category"] = [i for i in all_prompts if contest.categories[i] == category]
    lengths = [tuple(num_words(contest.outputs[name][i]) for name in pair) for i in all_prompts]
    similar = [max(a, b) <= (1.0 + ABOUT_AS_LONG) * min(a, b) for a, b in lengths]
    groups["its answer is longer"] = [i for i in all_prompts if not similar[i] and lengths[i][0] > lengths[i][1]]
    groups["about as long"] = [i for i in all_prompts if similar[i]]
    groups["its answer is shorter"] = [i for i in all_prompts if not similar[i] and lengths[i][0] < lengths[i][1]]
    return [(group, head_to_head(contest, verdicts, pair, prompts)) for group, prompts in groups.items()]
