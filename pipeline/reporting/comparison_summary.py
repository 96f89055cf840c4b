"""The sentences that open a comparison of policies: who is preferred, by whom, how surely, and why else that may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.benchmark.policy_comparison.contest import Contest
from pipeline.benchmark.policy_comparison.policy_answers import BENCHMARK_TITLES
from pipeline.benchmark.policy_comparison.verdicts import REWARD_MODEL, Verdicts
from pipeline.benchmark.policy_comparison.win_matrix import head_to_head
from pipeline.records import Metrics
from pipeline.reporting.verdict import OTHER_LENGTH, Level

INTERVAL = "95% Wilson interval"
"""The kind of interval of every win rate on the page."""


@dataclass(frozen=True, kw_only=True)
class SummaryLine:
    """What one judge says of two policies."""

    level: Level
    text: str
    evidence: str
    """On how many answers it rests, and how they differ."""


def comparison_summary(contest: Contest, all_verdicts: Sequence[Verdicts]) -> list[SummaryLine]:
    """For each policy against the first one, a line for every judge."""
    first, *others = contest.policies
    return [
        _line(contest, verdicts, policy, first)
        for policy in others
        for verdicts in all_verdicts
        if (policy, first) in verdicts.pairs
    ]


def preferred_in_words(m: Metrics) -> str:
    """A win rate with its interval: "preferred in 54 of 100, between 49 and 59"."""
    return f"preferred in {100 * m['win_rate']:.0f} of 100, between {100 * m['low']:.0f} and {100 * m['high']:.0f}"


def _line(contest: Contest, verdicts: Verdicts, policy: str, first: str) -> SummaryLine:
    m = head_to_head(contest, verdicts, (policy, first), range(len(contest.prompts)))
    title = BENCHMARK_TITLES[contest.benchmark]
    if not m["n"]:
        return SummaryLine(
            level="unsure", text=f"{verdicts.judge} gave no verdict on {policy} and {first}.", evidence=f"{title}."
        )
    judge = f"the {verdicts.judge}" if verdicts.judge == REWARD_MODEL else verdicts.judge
    told = f"By {judge} its answers are {preferred_in_words(m)}."
    level: Level = "unsure"
    if m["low"] > 0.5 and verdicts.judge == REWARD_MODEL:
        text = f"The reward model prefers {policy} to {first}: its answers are {preferred_in_words(m)}. "
        text += "A policy that was trained on this reward model pleases it, so that alone is no proof."
    elif m["low"] > 0.5:
        level, text = "good", f"{policy} is better than {first}. {told}"
    elif m["high"] < 0.5:
        level, text = "bad", f"{policy} is worse than {first}. {told}"
    else:
        text = f"It is not known whether {policy} is better than {first}. {told} 50 of 100 would be no difference."
    return SummaryLine(level=level, text=text + _length_caution(m), evidence=_evidence(m, title))


def _length_caution(m: Metrics) -> str:
    longer, shorter = max(m["own_words"], m["other_words"]), min(m["own_words"], m["other_words"])
    if longer < OTHER_LENGTH * max(shorter, 1.0):
        return ""
    return " The lengths of the answers differ much, so this may be a preference for length: read the answers."


def _evidence(m: Metrics, title: str) -> str:
    return (
        f"{title}, {m['n']:.0f} prompts; {INTERVAL}. {100 * m['ties']:.0f}% are ties, and a tie counts one half. "
        f"{m['identical']:.0f} of the {m['n']:.0f} pairs of answers are identical. "
        f"{m['own_words']:.0f} words an answer against {m['other_words']:.0f}."
    )
