"""The answers of several policies to the same prompts of one benchmark, and what they contain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.benchmark.arena_hard.style_control import markdown_counts
from pipeline.benchmark.policy_comparison.policy_answers import BENCHMARK_TITLES, PolicyAnswers
from pipeline.errors import DataError
from pipeline.evaluation.reasons import named_contributions
from pipeline.objectives.reward_comparison import compare_rewards
from pipeline.records import Metrics, RewardScore


@dataclass(frozen=True, kw_only=True)
class Contest:
    """The answers of several policies to the prompts of one benchmark that all of them answered.

    Position i belongs to the same prompt in every sequence.
    """

    benchmark: str
    policies: tuple[str, ...]
    """Names in the order of the files. The other policies are compared with the first one."""
    prompts: tuple[str, ...]
    """Question ids; in AlpacaEval the instructions."""
    turns: tuple[tuple[str, ...], ...]
    """The user's text of each turn."""
    categories: tuple[str, ...]
    """Category of each prompt; empty where it is unknown."""
    outputs: Mapping[str, Sequence[tuple[str, ...]]]
    """Policy -> [N] answers; each has one text per turn."""
    rewards: Mapping[str, Sequence[RewardScore]]
    """Policy -> [N] rewards, for the policies whose answers were scored."""
    left_out: frozenset[str]
    """Prompts that some policy did not answer."""


def build_contests(all_answers: Sequence[PolicyAnswers]) -> list[Contest]:
    """One contest per benchmark. The policies have the same order, that of `all_answers`, in all of them.

    Raises:
        DataError: as `build_contest`.
    """
    order = list(dict.fromkeys(answers.policy for answers in all_answers))
    by_benchmark: dict[str, list[PolicyAnswers]] = {}
    for answers in sorted(all_answers, key=lambda answers: order.index(answers.policy)):
        by_benchmark.setdefault(answers.benchmark, []).append(answers)
    return [build_contest(by_benchmark[name]) for name in BENCHMARK_TITLES if name in by_benchmark]


def build_contest(all_answers: Sequence[PolicyAnswers]) -> Contest:
    """Combines the answers of several policies to the same prompts of one benchmark.

    Raises:
        DataError: there are fewer than two policies, two have the same name, or no prompt was answered by all of them.
    """
    by_policy = {answers.policy: answers for answers in all_answers}
    title = BENCHMARK_TITLES[all_answers[0].benchmark]
    if len(by_policy) < len(all_answers):
        names = [answers.policy for answers in all_answers]
        repeated = next(name for name in names if names.count(name) > 1)
        raise DataError(
            f"two files hold {title} answers of {repeated!r}. Rename one of the models, or leave a file out."
        )
    if len(all_answers) < 2:
        raise DataError(
            f"only {all_answers[0].policy!r} has {title} answers, so there is nothing to compare them with. Give "
            "the answers of another policy as well, or leave these out."
        )
    first, *others = all_answers
    shared = tuple(prompt for prompt in first.outputs if all(prompt in other.outputs for other in others))
    if not shared:
        raise DataError(
            f"no {title} prompt is answered by all of {', '.join(by_policy)}. Do the files belong together?"
        )
    all_prompts = {prompt for answers in all_answers for prompt in answers.outputs}
    categories = {prompt: category for answers in all_answers for prompt, category in answers.categories.items()}
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
        left_out=frozenset(all_prompts.difference(shared)),
    )


class LengthAndMarkdown(NamedTuple):
    """Words and markdown elements of one answer, or their means over several answers."""

    words: float
    headers: float
    list_items: float
    bold: float


def length_and_markdown(output: Sequence[str]) -> LengthAndMarkdown:
    """Words and markdown elements of an answer, over all its turns."""
    counts = [{kind: sum(forms.values()) for kind, forms in markdown_counts(turn).items()} for turn in output]
    headers, items, bold = (sum(c[kind] for c in counts) for kind in ("header_count", "list_count", "bold_count"))
    return LengthAndMarkdown(num_words(output), headers, items, bold)


def num_words(output: Sequence[str]) -> int:
    """Words of an answer, over all its turns."""
    return sum(len(turn.split()) for turn in output)


def answer_summaries(contest: Contest) -> dict[str, Metrics]:
    """Policy -> mean words and markdown elements per answer, and mean reward and posterior std of scored answers."""
    summaries: dict[str, Metrics] = {}
    for policy, outputs in contest.outputs.items():
        columns = zip(*map(length_and_markdown, outputs), strict=True)
        summary = {name: mean(column) for name, column in zip(LengthAndMarkdown._fields, columns, strict=True)}
        if policy in contest.rewards:
            rewards = contest.rewards[policy]
            summary |= {"reward": mean([r.mean for r in rewards]), "reward_std": mean([r.std for r in rewards])}
        summaries[policy] = summary
    return summaries


def margin_contributions(
    score: RewardScore, first: RewardScore, objectives: Sequence[str], verified: Sequence[str], *, policy: str
) -> list[tuple[str, float]]:
    """`named_contributions` to the reward of one answer minus that of the first policy's to the same prompt.

    Args:
        objectives: names in the order of the reward model; empty where they are unknown, and nothing is named.
        verified: those that are reasons.

    Raises:
        DataError: the number of names differs from the number of scores. Names the policy.
    """
    scores = score.objective_scores
    if not objectives or not scores:
        return []
    if len(objectives) != len(scores):
        raise DataError(f"{len(objectives)} objectives are named, {policy!r} was scored on {len(scores)}.")
    return named_contributions(compare_rewards(score, first).contributions, objectives, verified)


def mean_contributions(
    contest: Contest, objectives: Sequence[str], verified: Sequence[str]
) -> dict[str, list[tuple[str, float]]]:
    """Policy after the first -> (verified objective, mean of what it adds to the reward above the first policy's).

    The values add up to the difference of the mean rewards.
    """
    first, *others = contest.policies
    means: dict[str, list[tuple[str, float]]] = {}
    if first not in contest.rewards:
        return means
    for policy in (name for name in others if name in contest.rewards):
        parts = [
            margin_contributions(score, other, objectives, verified, policy=policy)
            for score, other in zip(contest.rewards[policy], contest.rewards[first], strict=True)
        ]
        means[policy] = [(column[0][0], mean([value for _, value in column])) for column in zip(*parts, strict=True)]
    return means


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean of at least one value."""
    return sum(values) / len(values)
