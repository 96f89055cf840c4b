"""What each judge decides between two policies, prompt by prompt."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pipeline.benchmark.alpaca_eval.annotations import Annotations
from pipeline.benchmark.arena_hard.battles import Battle
from pipeline.benchmark.arena_hard.games import Games
from pipeline.benchmark.mt_bench.grades import NO_GRADE, TurnGrade
from pipeline.benchmark.policy_comparison.contest import Contest, mean
from pipeline.errors import DataError

Pair = tuple[str, str]

REWARD_MODEL = "reward model"
"""Name of the judge where answers have rewards."""


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """The verdicts of one judge on pairs of answers. Every mapping holds both directions of a pair."""

    judge: str
    pairs: Mapping[Pair, Sequence[float | None]]
    """(policy, other) -> [N] probability that the policy's answer is the better one; None without a verdict."""
    weights: Mapping[Pair, Sequence[float]]
    """(policy, other) -> [N] weight of the verdict in the benchmark."""
    margins: Mapping[Pair, Sequence[float]]
    """(policy, other) -> [N] how much better the policy's answer is: difference of rewards or grades, or P - 1/2."""
    grades: Mapping[str, Sequence[tuple[float | None, ...]]]
    """Policy -> [N] grade of each turn, or None without a grade; empty where the judge does not grade."""


def reward_verdicts(contest: Contest) -> list[Verdicts]:
    """The larger reward wins, and a tie is half a win. Empty where fewer than two policies have rewards."""
    return _verdicts_of_scores(
        REWARD_MODEL, {policy: [s.mean for s in scores] for policy, scores in contest.rewards.items()}
    )


def judged_verdicts(contest: Contest, judged: Sequence[Annotations]) -> list[Verdicts]:
    """AlpacaEval: the preferences of each judge, as probabilities.

    Raises:
        DataError: a judged model, its baseline or an instruction is not in the contest; or the same judge judged a
            pair of models twice.
    """
    judged_pairs = [
        JudgedPair(
            file.judge,
            (file.model, file.baseline),
            {text: (p, 1.0) for text, p in zip(file.instructions, file.win_probabilities(), strict=True)},
        )
        for file in judged
    ]
    return _verdicts_of_pairs(contest, judged_pairs)


def game_verdicts(contest: Contest, games: Sequence[Games]) -> list[Verdicts]:
    """Arena-Hard: the model's mean share of wins over a question's games; a clear win counts three times.

    With these verdicts, the win rate of a model over the baseline equals Arena-Hard's own.

    Raises:
        DataError: as `judged_verdicts`.
    """
    judged_pairs = []
    for file in games:
        by_pair: dict[Pair, dict[str, list[Battle]]] = {}
        for battle in file.battles:
            by_pair.setdefault((battle.model_b, battle.model_a), {}).setdefault(battle.question_id, []).append(battle)
        for pair, by_question in by_pair.items():
            verdicts: dict[str, tuple[float | None, float]] = {}
            for question_id, battles in by_question.items():
                weight = sum(battle.weight for battle in battles)
                won = sum(battle.weight * (1.0 - battle.outcome) for battle in battles)
                verdicts[question_id] = (won / weight, float(weight))
            judged_pairs.append(JudgedPair(", ".join(file.judges) or "unnamed judge", pair, verdicts))
    return _verdicts_of_pairs(contest, judged_pairs)


def grade_verdicts(contest: Contest, grades: Sequence[TurnGrade]) -> list[Verdicts]:
    """MT-Bench: the answer with the higher mean grade over its turns wins, and a tie is half a win.

    There is no verdict where a grade of either answer is missing. A judge who graded fewer than two policies gives no
    verdicts.

    Raises:
        DataError: a graded model or question is not in the contest, or one judge graded a turn twice.
    """
    by_judge: dict[str, dict[str, list[list[float | None]]]] = {}
    position = {prompt: i for i, prompt in enumerate(contest.prompts)}
    seen: set[tuple[str, str, int, int]] = set()
    for row in grades:
        description = f"{row.judge!r} grades turn {row.turn} of question {row.question_id} by {row.model!r}"
        if row.model not in contest.policies:
            raise DataError(f"{description}, and there are no answers of that model. Give its file of answers as well.")
        if str(row.question_id) in contest.left_out:
            continue
        if str(row.question_id) not in position:
            raise DataError(
                f"{description}, a question that none of the policies answered. Give the answers that were graded."
            )
        if (key := (row.judge, row.model, row.question_id, row.turn)) in seen:
            raise DataError(f"{description} in two files. Give one.")
        seen.add(key)
        ungraded: list[list[float | None]] = [[None] * len(turns) for turns in contest.turns]
        of_model = by_judge.setdefault(row.judge, {}).setdefault(row.model, ungraded)
        of_model[position[str(row.question_id)]][row.turn - 1] = None if row.score == NO_GRADE else row.score
    return [
        replace(verdicts, grades={policy: [tuple(g) for g in columns] for policy, columns in by_policy.items()})
        for judge, by_policy in by_judge.items()
        for verdicts in _verdicts_of_scores(
            judge, {policy: [_mean_grade(g) for g in columns] for policy, columns in by_policy.items()}
        )
    ]


def _mean_grade(grades: Sequence[float | None]) -> float | None:
    known = [grade for grade in grades if grade is not None]
    return mean(known) if len(known) == len(grades) else None


def _verdicts_of_scores(judge: str, scores: Mapping[str, Sequence[float | None]]) -> list[Verdicts]:
    """The larger score wins; both directions of every pair."""
    if len(scores) < 2:
        return []
    pairs, margins = {}, {}
    for a, b in itertools.permutations(scores, 2):
        gaps = [None if x is None or y is None else x - y for x, y in zip(scores[a], scores[b], strict=True)]
        pairs[a, b] = [None if gap is None else 0.5 * (1 + (gap > 0) - (gap < 0)) for gap in gaps]
        margins[a, b] = [gap or 0.0 for gap in gaps]
    weights = {pair: [1.0] * len(verdicts) for pair, verdicts in pairs.items()}
    return [Verdicts(judge=judge, pairs=pairs, weights=weights, margins=margins, grades={})]


class JudgedPair(NamedTuple):
    """One judge's verdicts on one pair of models."""

    judge: str
    pair: Pair
    verdicts: Mapping[str, tuple[float | None, float]]
    """Prompt -> (probability that the answer of the first model is better, weight)."""


def _verdicts_of_pairs(contest: Contest, judged_pairs: Sequence[JudgedPair]) -> list[Verdicts]:
    """The verdicts of each judge on the prompts of the contest, in both directions."""
    pairs: dict[str, dict[Pair, list[float | None]]] = {}
    weights: dict[str, dict[Pair, list[float]]] = {}
    for judge, (model, baseline), verdicts in judged_pairs:
        description = f"{judge!r} compares {model!r} with {baseline!r}"
        for name in (model, baseline):
            if name not in contest.policies:
                raise DataError(
                    f"{description}, and there are no answers of {name!r}. Give its file of answers as well."
                )
        unknown = sorted(verdicts.keys() - set(contest.prompts) - contest.left_out)
        if unknown:
            raise DataError(
                f"{description} on {len(unknown)} prompts that none of the policies answered, as {unknown[0]!r:.80}. "
                "Give the answers that were judged."
            )
        by_pair = pairs.setdefault(judge, {})
        if (model, baseline) in by_pair:
            raise DataError(f"{description} in two files. Give one.")
        verdicts_in_order = [verdicts.get(prompt, (None, 0.0)) for prompt in contest.prompts]
        by_pair[model, baseline] = [p for p, _ in verdicts_in_order]
        by_pair[baseline, model] = [None if p is None else 1.0 - p for p, _ in verdicts_in_order]
        for pair in ((model, baseline), (baseline, model)):
            weights.setdefault(judge, {})[pair] = [weight for _, weight in verdicts_in_order]
    return [
        Verdicts(
            judge=judge,
            pairs=by_pair,
            weights=weights[judge],
            margins={pair: [0.0 if p is None else p - 0.5 for p in verdicts] for pair, verdicts in by_pair.items()},
            grades={},
        )
        for judge, by_pair in pairs.items()
    ]
