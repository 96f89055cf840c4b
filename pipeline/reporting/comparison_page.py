"""The comparison of policies as one self-contained page: the paper's Table 1, then one part per benchmark."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2

from pipeline.benchmark.mt_bench.grades import MT_BENCH_CATEGORIES, mean_grades
from pipeline.benchmark.policy_comparison.contest import (
    Contest,
    answer_summaries,
    margin_contributions,
    mean_contributions,
    num_words,
)
from pipeline.benchmark.policy_comparison.judgment_files import Judgments
from pipeline.benchmark.policy_comparison.leaderboard import Leaderboard
from pipeline.benchmark.policy_comparison.policy_answers import BENCHMARK_TITLES
from pipeline.benchmark.policy_comparison.verdicts import (
    REWARD_MODEL,
    Pair,
    Verdicts,
    game_verdicts,
    grade_verdicts,
    judged_verdicts,
    reward_verdicts,
)
from pipeline.benchmark.policy_comparison.win_matrix import breakdown, difference_over_shared_opponent, win_matrix
from pipeline.errors import DataError
from pipeline.records import Metrics
from pipeline.reporting.comparison_summary import INTERVAL, comparison_summary


@dataclass(frozen=True, kw_only=True)
class JudgedContest:
    """The answers to one benchmark, and the verdicts and grades of all judges."""

    contest: Contest
    verdicts: Sequence[Verdicts]
    grades: Mapping[str, Mapping[str, Metrics]]
    """Judge -> policy -> `mean_grades`; empty for all benchmarks but MT-Bench."""


def judged_contests(contests: Sequence[Contest], judgments: Judgments) -> list[JudgedContest]:
    """Assigns the judgments to the contests of their benchmarks.

    Raises:
        DataError: a benchmark has judgments but no answers; or as the functions that make the verdicts.
    """
    by_benchmark = {"alpaca_eval": judgments.annotations, "arena_hard": judgments.games, "mt_bench": judgments.grades}
    for benchmark, rows in by_benchmark.items():
        if rows and benchmark not in {contest.benchmark for contest in contests}:
            raise DataError(
                f"there are judgments of {BENCHMARK_TITLES[benchmark]}, and no answers. Give the answers as well."
            )
    graders = sorted({row.judge for row in judgments.grades})
    judged = []
    for contest in contests:
        match contest.benchmark:
            case "arena_hard":
                verdicts = game_verdicts(contest, judgments.games)
            case "mt_bench":
                verdicts = grade_verdicts(contest, judgments.grades)
            case _:
                verdicts = judged_verdicts(contest, judgments.annotations)
        grades = {judge: mean_grades([row for row in judgments.grades if row.judge == judge]) for judge in graders}
        judged.append(
            JudgedContest(
                contest=contest,
                verdicts=[*reward_verdicts(contest), *verdicts],
                grades=grades if contest.benchmark == "mt_bench" else {},
            )
        )
    return judged


class PromptOrder(NamedTuple):
    """An order of the prompts: first those where `policy` loses most to `other` by the verdicts of `judge`."""

    judge: str
    policy: str
    other: str
    margins: Sequence[float]


def prompt_orders(contest: Contest, all_verdicts: Sequence[Verdicts]) -> list[PromptOrder]:
    """For every judge, each policy against the first one, starting with the last policy."""
    first, *others = contest.policies
    return [
        PromptOrder(verdicts.judge, policy, first, verdicts.margins[policy, first])
        for verdicts in all_verdicts
        for policy in reversed(others)
        if (policy, first) in verdicts.margins
    ]


def comparison_page(
    judged: Sequence[JudgedContest],
    *,
    leaderboard: Leaderboard | None = None,
    objectives: Sequence[str] = (),
    verified: Sequence[str] = (),
) -> str:
    """The page as HTML. It loads nothing from elsewhere.

    Args:
        leaderboard: the benchmarks' own statistics of the policies.
        objectives: names of the objectives, in the order of the reward model.
        verified: those that may be given as reasons.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.reporting", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["interval"] = INTERVAL
    policies = list(dict.fromkeys(policy for each in judged for policy in each.contest.policies))
    return environment.get_template("comparison.html.j2").render(
        policies=policies,
        summary=[line for each in judged for line in comparison_summary(each.contest, each.verdicts)],
        leaderboard=leaderboard,
        parts=[_part(each, objectives, verified) for each in judged],
    )


def _part(judged: JudgedContest, objectives: Sequence[str], verified: Sequence[str]) -> dict[str, Any]:
    """The values of one benchmark that the template shows."""
    contest = judged.contest
    orders = prompt_orders(contest, judged.verdicts)
    # Each pair once: the policy that comes later in the order against the earlier one.
    pairs = [
        (verdicts, pair)
        for verdicts in judged.verdicts
        for pair in verdicts.pairs
        if contest.policies.index(pair[1]) < contest.policies.index(pair[0])
    ]
    positions = range(len(contest.prompts))
    return {
        "title": BENCHMARK_TITLES[contest.benchmark],
        "policies": contest.policies,
        "left_out": len(contest.left_out),
        "scored": sorted(contest.rewards),
        "grade_tables": _grade_tables(judged),
        "matrices": [
            (verdicts.judge, win_matrix(contest, verdicts), _indirect_differences(contest, verdicts))
            for verdicts in judged.verdicts
        ],
        "summaries": answer_summaries(contest),
        "breakdowns": [(verdicts.judge, *pair, breakdown(contest, verdicts, pair)) for verdicts, pair in pairs],
        "mean_contributions": mean_contributions(contest, objectives, verified),
        "orders": orders,
        "categories": sorted(set(contest.categories)) if len(set(contest.categories)) > 1 else [],
        "rows": [
            {
                "turns": contest.turns[i],
                "category": contest.categories[i],
                "margins": [order.margins[i] for order in orders],
                "answers": [_answer(judged, policy, i, objectives, verified) for policy in contest.policies],
                "verdicts": [
                    (verdicts.judge, *pair, verdicts.pairs[pair][i])
                    for verdicts, pair in pairs
                    if verdicts.judge != REWARD_MODEL and not verdicts.grades
                ],
            }
            for i in (sorted(positions, key=lambda i: orders[0].margins[i]) if orders else positions)
        ],
    }


def _indirect_differences(contest: Contest, verdicts: Verdicts) -> dict[Pair, tuple[str, Metrics]]:
    """`difference_over_shared_opponent` of each pair that the judge did not compare directly."""
    differences = {
        pair: difference_over_shared_opponent(verdicts, pair)
        for pair in itertools.permutations(contest.policies, 2)
        if pair not in verdicts.pairs
    }
    return {pair: difference for pair, difference in differences.items() if difference is not None}


def _answer(
    judged: JudgedContest, policy: str, i: int, objectives: Sequence[str], verified: Sequence[str]
) -> dict[str, Any]:
    contest = judged.contest
    first = contest.policies[0]
    is_compared = policy != first and first in contest.rewards and policy in contest.rewards
    score = contest.rewards[policy][i] if policy in contest.rewards else None
    outputs = contest.outputs[policy][i]
    graded = [verdicts for verdicts in judged.verdicts if policy in verdicts.grades]
    return {
        "policy": policy,
        "turns": [
            (output, [(verdicts.judge, verdicts.grades[policy][i][turn]) for verdicts in graded])
            for turn, output in enumerate(outputs)
        ],
        "words": num_words(outputs),
        "score": score,
        "parts": margin_contributions(score, contest.rewards[first][i], objectives, verified, policy=policy)
        if score is not None and is_compared
        else [],
    }


def _grade_tables(judged: JudgedContest) -> list[tuple[str, list[str], list[tuple[str, list[float | None]]]]]:
    """(judge, columns, (policy, mean grades))."""
    keys = ["average", "turn_1", "turn_2", *(f"category/{name}" for name in MT_BENCH_CATEGORIES)]
    names = ["average", "turn 1", "turn 2", *MT_BENCH_CATEGORIES]
    return [
        (
            judge,
            names,
            [
                (name, [by_policy[name].get(key) for key in keys])
                for name in judged.contest.policies
                if name in by_policy
            ],
        )
        for judge, by_policy in judged.grades.items()
    ]
