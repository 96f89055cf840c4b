"""The comparison of policies as one self-contained page: a part for each benchmark, and the paper's Table 1 above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2

from pipeline.benchmark.mt_bench.grades import MT_BENCH_CATEGORIES, mean_grades
from pipeline.benchmark.policy_comparison.contest import (
    REWARD_MODEL,
    Contest,
    Verdicts,
    breakdown,
    contributions,
    difference_over_shared_opponent,
    game_verdicts,
    grade_verdicts,
    judged_verdicts,
    mean_contributions,
    num_words,
    reward_verdicts,
    summaries,
    win_matrix,
)
from pipeline.benchmark.policy_comparison.contest_files import TITLES, Judgments
from pipeline.benchmark.policy_comparison.leaderboard import Leaderboard
from pipeline.errors import DataError
from pipeline.records import Metrics


@dataclass(frozen=True, kw_only=True)
class JudgedContest:
    """One benchmark: the answers, and what all judges say of them."""

    contest: Contest
    verdicts: Sequence[Verdicts]
    grades: Mapping[str, Mapping[str, Metrics]]
    """MT-Bench alone: judge -> policy -> `mt_bench.scores`."""


def judged_contests(contests: Sequence[Contest], judgments: Judgments) -> list[JudgedContest]:
    """Brings the judgments to the benchmarks that they are about.

    Raises:
        DataError: judgments of a benchmark without answers; or as the functions that make the verdicts.
    """
    given = {"alpaca_eval": judgments.annotations, "arena_hard": judgments.games, "mt_bench": judgments.grades}
    for benchmark, rows in given.items():
        if rows and benchmark not in {contest.benchmark for contest in contests}:
            raise DataError(f"there are judgments of {TITLES[benchmark]}, and no answers. Give the answers as well.")
    graded_by = sorted({row.judge for row in judgments.grades})
    found = []
    for contest in contests:
        match contest.benchmark:
            case "arena_hard":
                verdicts = game_verdicts(contest, judgments.games)
            case "mt_bench":
                verdicts = grade_verdicts(contest, judgments.grades)
            case _:
                verdicts = judged_verdicts(contest, judgments.annotations)
        grades = {judge: mean_grades([row for row in judgments.grades if row.judge == judge]) for judge in graded_by}
        found.append(
            JudgedContest(
                contest=contest,
                verdicts=[*reward_verdicts(contest), *verdicts],
                grades=grades if contest.benchmark == "mt_bench" else {},
            )
        )
    return found


class Order(NamedTuple):
    """A way to sort the prompts: where `policy` loses most to `other`, as `judge` sees it."""

    judge: str
    policy: str
    other: str
    margins: Sequence[float]


def orders(of: Contest, verdicts: Sequence[Verdicts]) -> list[Order]:
    """Of every judge, each policy against the first; the last policy comes first."""
    first, *others = of.policies
    return [
        Order(said.judge, policy, first, said.margins[policy, first])
        for said in verdicts
        for policy in reversed(others)
        if (policy, first) in said.margins
    ]


def comparison_page(
    judged: Sequence[JudgedContest], *, leaderboard: Leaderboard | None = None, objectives: Sequence[str] = ()
) -> str:
    """The page as HTML; it fetches nothing.

    Args:
        leaderboard: what the benchmarks' own statistics say of the policies.
        objectives: their names, in the order of the reward model.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.benchmark", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    policies = list(dict.fromkeys(policy for each in judged for policy in each.contest.policies))
    return environment.get_template("comparison.html.j2").render(
        policies=policies, leaderboard=leaderboard, parts=[_part(each, objectives) for each in judged]
    )


def _part(judged: JudgedContest, objectives: Sequence[str]) -> dict[str, Any]:
    """What the template shows of one benchmark."""
    of, verdicts = judged.contest, judged.verdicts
    by = orders(of, verdicts)
    later_first = [
        (said, pair)
        for said in verdicts
        for pair in said.pairs
        if of.policies.index(pair[1]) < of.policies.index(pair[0])
    ]
    places = range(len(of.prompts))
    return {
        "title": TITLES[of.benchmark],
        "policies": of.policies,
        "left_out": len(of.left_out),
        "scored": sorted(of.rewards),
        "grade_tables": _grade_tables(judged),
        "matrices": [
            (
                said.judge,
                win_matrix(of, said),
                {
                    (a, b): indirect
                    for a in of.policies
                    for b in of.policies
                    if a != b and (a, b) not in said.pairs
                    for indirect in [difference_over_shared_opponent(said, (a, b))]
                    if indirect is not None
                },
            )
            for said in verdicts
        ],
        "summaries": summaries(of),
        "breakdowns": [(said.judge, *pair, breakdown(of, said, pair)) for said, pair in later_first],
        "mean_contributions": mean_contributions(of, objectives),
        "orders": by,
        "categories": sorted(set(of.categories)) if len(set(of.categories)) > 1 else [],
        "rows": [
            {
                "turns": of.turns[i],
                "category": of.categories[i],
                "margins": [order.margins[i] for order in by],
                "answers": [_answer(judged, policy, i, objectives) for policy in of.policies],
                "verdicts": [
                    (said.judge, *pair, said.pairs[pair][i])
                    for said, pair in later_first
                    if said.judge != REWARD_MODEL and not said.grades
                ],
            }
            for i in (sorted(places, key=lambda i: by[0].margins[i]) if by else places)
        ],
    }


def _answer(judged: JudgedContest, policy: str, i: int, objectives: Sequence[str]) -> dict[str, Any]:
    of = judged.contest
    score = of.rewards[policy][i] if policy in of.rewards else None
    outputs = of.outputs[policy][i]
    return {
        "policy": policy,
        "turns": [
            (output, [(said.judge, said.grades[policy][i][turn]) for said in judged.verdicts if policy in said.grades])
            for turn, output in enumerate(outputs)
        ],
        "words": num_words(outputs),
        "score": score,
        "parts": contributions(score, objectives, of=policy) if score else [],
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
