"""Policies side by side on one self-contained page: who wins, at what length and style, and on which answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2

from pipeline.benchmark.arena_hard import markdown_counts
from pipeline.benchmark.win_rate import win_rate
from pipeline.errors import DataError
from pipeline.records import Answer, Metrics


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Policies and their answers to the prompts that all of them answered."""

    policies: tuple[str, ...]
    """In the order given: the first is the one the others are held against."""
    prompts: tuple[str, ...]
    answers: Mapping[str, Sequence[Answer]]
    """Policy -> its answer to every prompt."""
    left_out: int
    """Prompts that some policy did not answer."""


def contest(answers: Sequence[Sequence[Answer]]) -> Contest:
    """Brings answers to the same prompts together, by the text of the instruction.

    Raises:
        DataError: fewer than two policies, a name that is there twice, an instruction that one policy answers twice, or
            none that all of them answer.
    """
    by_policy: dict[str, dict[str, Answer]] = {}
    for policy_answers in answers:
        names = {answer.generator for answer in policy_answers}
        if len(names) != 1:
            raise DataError(f"a file of answers holds {len(names)} generators {sorted(names)[:3]}; give each its own.")
        [name] = names
        if name in by_policy:
            raise DataError(f"two files hold answers of {name!r}. Rename one generator, or leave one file out.")
        by_policy[name] = {answer.instruction: answer for answer in policy_answers}
        if len(by_policy[name]) < len(policy_answers):
            raise DataError(f"{name!r} answers some instruction twice; give one answer each.")
    if len(by_policy) < 2:
        raise DataError(f"{len(by_policy)} policies cannot be compared; give two files of answers at least.")
    first, *others = by_policy.values()
    shared = tuple(prompt for prompt in first if all(prompt in other for other in others))
    if not shared:
        raise DataError(f"no instruction is answered by all of {', '.join(by_policy)}. Do the files belong together?")
    everything = {prompt for policy in by_policy.values() for prompt in policy}
    return Contest(
        policies=tuple(by_policy),
        prompts=shared,
        answers={name: [found[prompt] for prompt in shared] for name, found in by_policy.items()},
        left_out=len(everything) - len(shared),
    )


def summaries(of: Contest) -> dict[str, Metrics]:
    """Policy -> mean reward and its posterior standard deviation, words and markdown elements per answer."""
    return {policy: _summary(answers) for policy, answers in of.answers.items()}


def _summary(answers: Sequence[Answer]) -> Metrics:
    n = len(answers)
    markdown = [markdown_counts(answer.output) for answer in answers]
    return {
        "reward": sum(a.score.mean for a in answers) / n,
        "reward_std": sum(a.score.std for a in answers) / n,
        "words": sum(len(a.output.split()) for a in answers) / n,
        **{kind: sum(sum(counts[kind].values()) for counts in markdown) / n for kind in markdown[0]},
    }


def win_matrix(of: Contest) -> dict[str, dict[str, Metrics]]:
    """matrix[a][b]: win rate of a over b by reward, with its 95% interval; no entry for a policy against itself."""
    rewards = {policy: [answer.score.mean for answer in answers] for policy, answers in of.answers.items()}
    return {a: {b: win_rate(rewards[a], rewards[b]) for b in of.policies if b != a} for a in of.policies}


def worst_losses_first(of: Contest) -> list[int]:
    """Positions of the prompts, by how much reward the last policy loses to the first."""
    first, last = (of.answers[policy] for policy in (of.policies[0], of.policies[-1]))
    margins = [b.score.mean - a.score.mean for a, b in zip(first, last, strict=True)]
    return sorted(range(len(margins)), key=lambda i: margins[i])


def contributions(answer: Answer, objectives: Sequence[str]) -> list[tuple[str, float]]:
    """(objective, weight x score), in the order of the objectives; empty where the reward has no reasons."""
    weights, scores = answer.score.objective_weights, answer.score.objective_scores
    names = objectives or [f"objective {k + 1}" for k in range(len(scores))]
    if scores and len(names) != len(scores):
        raise DataError(f"{len(names)} objectives are named, {answer.generator!r} was scored on {len(scores)}.")
    return [(name, w * s) for name, w, s in zip(names, weights, scores, strict=False)]


def comparison_page(of: Contest, objectives: Sequence[str] = ()) -> str:
    """The page as HTML; it fetches nothing."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.benchmark", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    rows = [
        (of.prompts[i], [(p, of.answers[p][i], contributions(of.answers[p][i], objectives)) for p in of.policies])
        for i in worst_losses_first(of)
    ]
    return environment.get_template("comparison.html.j2").render(
        policies=of.policies, left_out=of.left_out, summaries=summaries(of), matrix=win_matrix(of), rows=rows
    )
