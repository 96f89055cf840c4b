"""Policies side by side on one benchmark: who wins, at what length and style, and on which answers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from pipeline.benchmark.alpaca_eval.annotations import Annotations
from pipeline.benchmark.arena_hard.battles import Battle
from pipeline.benchmark.arena_hard.games import Games
from pipeline.benchmark.arena_hard.style_control import markdown_counts
from pipeline.benchmark.mt_bench.grades import NO_GRADE, TurnGrade
from pipeline.benchmark.policy_comparison.contest_files import TITLES, PolicyAnswers
from pipeline.errors import DataError
from pipeline.evaluation.win_rate import NORMAL_QUANTILE_95, win_rate_of_preferences
from pipeline.records import Metrics, RewardScore

Pair = tuple[str, str]

REWARD_MODEL = "reward model"
"""The judge where answers carry their rewards."""

ABOUT_AS_LONG = 0.1
"""Two answers are about as long when the longer one has at most a tenth more words."""


# ----------------------------------------------------------------------------- what is compared


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Policies and their answers to what all of them answered of one benchmark; position i is the same prompt
    everywhere.
    """

    benchmark: str
    policies: tuple[str, ...]
    """In the order given: the first is the one the others are held against."""
    prompts: tuple[str, ...]
    """Ids of the questions; in AlpacaEval the instructions."""
    turns: tuple[tuple[str, ...], ...]
    """What the user says, turn by turn."""
    categories: tuple[str, ...]
    """Of each prompt; empty where it is unknown."""
    outputs: Mapping[str, Sequence[tuple[str, ...]]]
    """Policy -> [N] answers, one to each turn."""
    rewards: Mapping[str, Sequence[RewardScore]]
    """Of the policies whose answers were scored."""
    left_out: frozenset[str]
    """Prompts that some policy did not answer."""


def contests(given: Sequence[PolicyAnswers]) -> list[Contest]:
    """One contest for each benchmark, in the order in which they come; policies keep their order over all of them.

    Raises:
        DataError: as `contest`.
    """
    order = list(dict.fromkeys(answers.policy for answers in given))
    by_benchmark: dict[str, list[PolicyAnswers]] = {}
    for answers in sorted(given, key=lambda answers: order.index(answers.policy)):
        by_benchmark.setdefault(answers.benchmark, []).append(answers)
    return [contest(by_benchmark[name]) for name in TITLES if name in by_benchmark]


def contest(given: Sequence[PolicyAnswers]) -> Contest:
    """Brings the answers to the same prompts of one benchmark together.

    Raises:
        DataError: fewer than two policies, a name that is there twice, or no prompt that all of them answer.
    """
    by_policy = {answers.policy: answers for answers in given}
    title = TITLES[given[0].benchmark]
    if len(by_policy) < len(given):
        names = [answers.policy for answers in given]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"two files hold {title} answers of {twice!r}. Rename one of the models, or leave a file out.")
    if len(given) < 2:
        raise DataError(
            f"only {given[0].policy!r} has {title} answers, and nothing to be compared with. Give those of another "
            "policy as well, or leave them out."
        )
    first, *others = given
    shared = tuple(prompt for prompt in first.outputs if all(prompt in other.outputs for other in others))
    if not shared:
        raise DataError(
            f"no {title} prompt is answered by all of {', '.join(by_policy)}. Do the files belong together?"
        )
    everything = {prompt for answers in given for prompt in answers.outputs}
    categories = {prompt: category for answers in given for prompt, category in answers.categories.items()}
    return Contest(
        benchmark=first.benchmark,
        policies=tuple(by_policy),
        prompts=shared,
        turns=tuple(first.turns[prompt] for prompt in shared),
        categories=tuple(categories.get(prompt, "") for prompt in shared),
        outputs={name: [answers.outputs[prompt] for prompt in shared] for name, answers in by_policy.items()},
        rewards={
            name: [answers.rewards[prompt] for prompt in shared]
            for name, answers in by_policy.items()
            if answers.rewards
        },
        left_out=frozenset(everything.difference(shared)),
    )


# ----------------------------------------------------------------------------- length and style


class Style(NamedTuple):
    """Of one answer, or of several on average."""

    words: float
    headers: float
    list_items: float
    bold: float


def style_of(output: Sequence[str]) -> Style:
    """Of an answer, all its turns together."""
    counts = [{kind: sum(forms.values()) for kind, forms in markdown_counts(turn).items()} for turn in output]
    headers, items, bold = (sum(c[kind] for c in counts) for kind in ("header_count", "list_count", "bold_count"))
    return Style(num_words(output), headers, items, bold)


def num_words(output: Sequence[str]) -> int:
    """Of an answer, all its turns together."""
    return sum(len(turn.split()) for turn in output)


def summaries(of: Contest) -> dict[str, Metrics]:
    """Policy -> words and markdown elements per answer; mean reward and its posterior std where there are rewards."""
    found: dict[str, Metrics] = {}
    for policy, outputs in of.outputs.items():
        styles = [style_of(output) for output in outputs]
        found[policy] = {
            name: _mean(column) for name, column in zip(Style._fields, zip(*styles, strict=True), strict=True)
        }
        if policy in of.rewards:
            rewards = of.rewards[policy]
            found[policy] |= {"reward": _mean([r.mean for r in rewards]), "reward_std": _mean([r.std for r in rewards])}
    return found


# ----------------------------------------------------------------------------- who wins


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """What one judge says of pairs of answers."""

    judge: str
    pairs: Mapping[Pair, Sequence[float | None]]
    """(policy, other) -> [N] probability that the policy's answer is the better one; None without a verdict.

    Both directions are there, here and below.
    """
    weights: Mapping[Pair, Sequence[float]]
    """(policy, other) -> [N] how often the benchmark counts the verdict."""
    margins: Mapping[Pair, Sequence[float]]
    """(policy, other) -> [N] by how much the policy's answer is better: in reward, in grade, or P - 1/2."""
    grades: Mapping[str, Sequence[tuple[float | None, ...]]]
    """Policy -> [N] grade of each turn, None where there is none; empty where the judge does not grade."""


def reward_verdicts(of: Contest) -> list[Verdicts]:
    """The larger reward wins, a tie is half a win; nothing where fewer than two policies have rewards."""
    return _of_scores(REWARD_MODEL, {policy: [s.mean for s in scores] for policy, scores in of.rewards.items()})


def judged_verdicts(of: Contest, judged: Sequence[Annotations]) -> list[Verdicts]:
    """AlpacaEval: the preferences of each judge, as probabilities.

    Raises:
        DataError: a judged model, or its baseline, or an instruction is not in the contest; or a pair of models is
            judged twice by the same judge.
    """
    given = [
        Judged(
            file.judge,
            (file.model, file.baseline),
            {text: (p, 1.0) for text, p in zip(file.instructions, file.win_probabilities(), strict=True)},
        )
        for file in judged
    ]
    return _of_comparisons(of, given)


def game_verdicts(of: Contest, games: Sequence[Games]) -> list[Verdicts]:
    """Arena-Hard: over a question's games, the mean of what the model won of them, a clear win three times.

    So the win rate of a model over the baseline is Arena-Hard's own.

    Raises:
        DataError: as `judged_verdicts`.
    """
    given = []
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
            given.append(Judged(", ".join(file.judges) or "unnamed judge", pair, verdicts))
    return _of_comparisons(of, given)


def grade_verdicts(of: Contest, grades: Sequence[TurnGrade]) -> list[Verdicts]:
    """MT-Bench: of two answers the one with the higher mean grade of its turns wins, a tie is half a win.

    There is no verdict where a grade of either is missing; nothing of a judge who graded fewer than two policies.

    Raises:
        DataError: a graded model or question is not in the contest, or a turn is graded twice by one judge.
    """
    by_judge: dict[str, dict[str, list[list[float | None]]]] = {}
    place = {prompt: i for i, prompt in enumerate(of.prompts)}
    given: set[tuple[str, str, int, int]] = set()
    for row in grades:
        named = f"{row.judge!r} grades turn {row.turn} of question {row.question_id} by {row.model!r}"
        if row.model not in of.policies:
            raise DataError(f"{named}, and there are no answers of that model. Give its file of answers as well.")
        if str(row.question_id) in of.left_out:
            continue
        if str(row.question_id) not in place:
            raise DataError(
                f"{named}, a question that none of the policies answered. Give the answers that were graded."
            )
        if (key := (row.judge, row.model, row.question_id, row.turn)) in given:
            raise DataError(f"{named} in two files. Give one.")
        given.add(key)
        ungraded: list[list[float | None]] = [[None] * len(turns) for turns in of.turns]
        of_model = by_judge.setdefault(row.judge, {}).setdefault(row.model, ungraded)
        of_model[place[str(row.question_id)]][row.turn - 1] = None if row.score == NO_GRADE else row.score
    return [
        replace(verdicts, grades={policy: [tuple(g) for g in columns] for policy, columns in by_policy.items()})
        for judge, by_policy in by_judge.items()
        for verdicts in _of_scores(
            judge, {policy: [_mean_grade(g) for g in columns] for policy, columns in by_policy.items()}
        )
    ]


def _mean_grade(grades: Sequence[float | None]) -> float | None:
    known = [grade for grade in grades if grade is not None]
    return _mean(known) if len(known) == len(grades) else None


def _of_scores(judge: str, scores: Mapping[str, Sequence[float | None]]) -> list[Verdicts]:
    if len(scores) < 2:
        return []
    pairs, margins = {}, {}
    for a, b in itertools.permutations(scores, 2):
        gaps = [None if x is None or y is None else x - y for x, y in zip(scores[a], scores[b], strict=True)]
        pairs[a, b] = [None if gap is None else 0.5 * (1 + (gap > 0) - (gap < 0)) for gap in gaps]
        margins[a, b] = [gap or 0.0 for gap in gaps]
    weights = {pair: [1.0] * len(verdicts) for pair, verdicts in pairs.items()}
    return [Verdicts(judge=judge, pairs=pairs, weights=weights, margins=margins, grades={})]


class Judged(NamedTuple):
    """One judge's verdicts on one pair of models."""

    judge: str
    pair: Pair
    verdicts: Mapping[str, tuple[float | None, float]]
    """Prompt -> (probability that the first of the pair is better, how often it counts)."""


def _of_comparisons(of: Contest, given: Sequence[Judged]) -> list[Verdicts]:
    """Brings them to the prompts of the contest, by judge, in both directions."""
    pairs: dict[str, dict[Pair, list[float | None]]] = {}
    weights: dict[str, dict[Pair, list[float]]] = {}
    for judge, (model, baseline), verdicts in given:
        named = f"{judge!r} compares {model!r} with {baseline!r}"
        for name in (model, baseline):
            if name not in of.policies:
                raise DataError(f"{named}, and there are no answers of {name!r}. Give its file of answers as well.")
        unknown = sorted(verdicts.keys() - set(of.prompts) - of.left_out)
        if unknown:
            raise DataError(
                f"{named} on {len(unknown)} prompts that none of the policies answered, as {unknown[0]!r:.80}. "
                "Give the answers that were judged."
            )
        by_pair = pairs.setdefault(judge, {})
        if (model, baseline) in by_pair:
            raise DataError(f"{named} in two files. Give one.")
        ours = [verdicts.get(prompt, (None, 0.0)) for prompt in of.prompts]
        by_pair[model, baseline] = [p for p, _ in ours]
        by_pair[baseline, model] = [None if p is None else 1.0 - p for p, _ in ours]
        for pair in ((model, baseline), (baseline, model)):
            weights.setdefault(judge, {})[pair] = [weight for _, weight in ours]
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


def win_matrix(of: Contest, verdicts: Verdicts) -> dict[str, dict[str, Metrics]]:
    """matrix[a][b]: how often a beats b, over all prompts with a verdict; no entry for a pair that was not judged."""
    everything = range(len(of.prompts))
    return {
        a: {b: head_to_head(of, verdicts, (a, b), everything) for b in of.policies if (a, b) in verdicts.pairs}
        for a in of.policies
    }


def head_to_head(of: Contest, verdicts: Verdicts, pair: Pair, prompts: Sequence[int]) -> Metrics:
    """Win rate of the first of the pair over the second, with the length and style that came with it.

    Returns:
        `n`: prompts with a verdict. `win_rate`, `ties`, `low`, `high` of `win_rate_of_preferences`; `words` and
        `markdown`, by how many more per answer, over the same prompts. Without a verdict `n` = 0 alone.
    """
    policy, other = pair
    decided = [i for i in prompts if verdicts.pairs[pair][i] is not None]
    if not decided:
        return {"n": 0.0}
    ours, theirs = ([style_of(of.outputs[name][i]) for i in decided] for name in (policy, other))
    return {
        "n": float(len(decided)),
        **win_rate_of_preferences(
            [p for i in decided if (p := verdicts.pairs[pair][i]) is not None],
            [verdicts.weights[pair][i] for i in decided],
        ),
        "words": _mean([a.words - b.words for a, b in zip(ours, theirs, strict=True)]),
        "markdown": _mean([sum(a[1:]) - sum(b[1:]) for a, b in zip(ours, theirs, strict=True)]),
    }


def difference_over_shared_opponent(verdicts: Verdicts, pair: Pair) -> tuple[str, Metrics] | None:
    """Of two policies that the judge did not compare, but each with a third: by how much one's win rate is higher.

    D = P_a - P_b over the prompts where both have a verdict, P_a = sum_i w_i p_i / sum_i w_i;
    D +- 1.96 sd(d) / sqrt(n),  d_i = w_ai (p_ai - P_a) / mean(w_a) - w_bi (p_bi - P_b) / mean(w_b)

    Prompts are drawn, with both verdicts on each: what is hard for both policies cancels (the delta method for a
    difference of two ratios).

    Returns:
        The third policy and `difference`, `low`, `high`, in [-1, 1]; None where there is no such policy, or fewer than
        two prompts.
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


def breakdown(of: Contest, verdicts: Verdicts, pair: Pair) -> list[tuple[str, Metrics]]:
    """(group of prompts, `head_to_head` on it): all, each category where there are several, and by length.

    A policy that wins where its answers are longer, and loses where they are shorter, wins by length.
    """
    everything = range(len(of.prompts))
    groups: dict[str, Sequence[int]] = {"all prompts": everything}
    if len(set(of.categories)) > 1:
        for category in sorted(set(of.categories)):
            groups[category or "no category"] = [i for i in everything if of.categories[i] == category]
    lengths = [tuple(num_words(of.outputs[name][i]) for name in pair) for i in everything]
    near = [max(a, b) <= (1.0 + ABOUT_AS_LONG) * min(a, b) for a, b in lengths]
    groups["its answer is longer"] = [i for i in everything if not near[i] and lengths[i][0] > lengths[i][1]]
    groups["about as long"] = [i for i in everything if near[i]]
    groups["its answer is shorter"] = [i for i in everything if not near[i] and lengths[i][0] < lengths[i][1]]
    return [(group, head_to_head(of, verdicts, pair, prompts)) for group, prompts in groups.items()]


# ----------------------------------------------------------------------------- why


def contributions(score: RewardScore, objectives: Sequence[str], *, of: str) -> list[tuple[str, float, float]]:
    """(objective, weight, score), in the order of the objectives; empty where the reward has no reasons.

    Raises:
        DataError: another number of names than of scores; `of` names the policy.
    """
    weights, scores = score.objective_weights, score.objective_scores
    names = objectives or [f"objective {k + 1}" for k in range(len(scores))]
    if scores and len(names) != len(scores):
        raise DataError(f"{len(names)} objectives are named, {of!r} was scored on {len(scores)}.")
    return [(name, w, s) for name, w, s in zip(names, weights, scores, strict=False)]


def mean_contributions(of: Contest, objectives: Sequence[str]) -> dict[str, list[tuple[str, float]]]:
    """Policy -> (objective, mean of weight x score over its answers); the values add up to its mean reward."""
    found = {}
    for policy, rewards in of.rewards.items():
        parts = [contributions(score, objectives, of=policy) for score in rewards]
        found[policy] = [(column[0][0], _mean([w * s for _, w, s in column])) for column in zip(*parts, strict=True)]
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
