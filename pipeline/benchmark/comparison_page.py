"""Policies side by side on one self-contained page: who wins, at what length and style, and on which answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jinja2

from pipeline.benchmark.alpaca_eval import Annotations
from pipeline.benchmark.alpaca_eval_judging import read_model_outputs
from pipeline.benchmark.answers import read_answers
from pipeline.benchmark.arena_hard import markdown_counts
from pipeline.benchmark.leaderboard import LeaderboardRow
from pipeline.benchmark.win_rate import win_rate_of_preferences
from pipeline.data.files import read_rows
from pipeline.errors import DataError
from pipeline.records import Metrics, RewardScore

REWARD_MODEL = "reward model"
"""The judge where answers carry their rewards."""

ABOUT_AS_LONG = 0.1
"""Two answers are about as long when the longer one has at most a tenth more words."""


# ----------------------------------------------------------------------------- what is compared


@dataclass(frozen=True, kw_only=True)
class PolicyAnswers:
    """All answers of one policy, by instruction."""

    policy: str
    outputs: Mapping[str, str]
    rewards: Mapping[str, RewardScore]
    """Of every answer, or of none: where no reward model scored them."""
    categories: Mapping[str, str]
    """Of the prompts that have one."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Policies and their answers to the prompts that all of them answered; position i is the same prompt everywhere."""

    policies: tuple[str, ...]
    """In the order given: the first is the one the others are held against."""
    prompts: tuple[str, ...]
    categories: tuple[str, ...]
    """Of each prompt; empty where it is unknown."""
    outputs: Mapping[str, Sequence[str]]
    rewards: Mapping[str, Sequence[RewardScore]]
    """Of the policies whose answers were scored."""
    left_out: int
    """Prompts that some policy did not answer."""


def read_policy(path: Path, categories: Mapping[str, str]) -> PolicyAnswers:
    """A `model_outputs.json`, with the rewards that generate_benchmark writes or without.

    Args:
        categories: by prompt id or by instruction. A prompt that is not there keeps the `dataset` of its row.

    Raises:
        DataError: no answers of one generator, an instruction answered twice, or rewards of some answers only.
    """
    outputs = read_model_outputs(path)
    texts = {row.instruction: row.output for row in outputs}
    if len(texts) < len(outputs):
        raise DataError(f"{path}: {outputs[0].generator!r} answers some instruction twice; give one answer each.")
    scored = '"reward_mean"' in path.read_text()
    answers = read_answers(path) if scored else []
    known = {row.instruction: row.dataset for row in outputs if row.dataset is not None}
    known |= {text: categories[text] for text in texts if text in categories}
    known |= {a.instruction: categories[a.prompt_id] for a in answers if a.prompt_id in categories}
    return PolicyAnswers(
        policy=outputs[0].generator,
        outputs=texts,
        rewards={answer.instruction: answer.score for answer in answers},
        categories=known,
    )


def read_categories(path: Path) -> dict[str, str]:
    """Prompt id or instruction -> category: of generate_benchmark's `planted.json`, or of a question file.

    Raises:
        DataError: neither of them.
    """
    if path.suffix == ".json":
        try:
            kinds = json.loads(path.read_text())["kinds"]
            return {str(prompt_id): str(kind) for prompt_id, kind in kinds.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} holds no kinds of prompts ({error!r}); give planted.json or a .jsonl") from error
    found = {}
    for row in read_rows(str(path)):
        category = row.require("category" if "category" in row.values else "dataset", str)
        names = [str(row.values[key]) for key in ("uid", "question_id", "instruction", "prompt") if key in row.values]
        if not names:
            raise DataError(f"{row.place}: no uid, question_id, instruction or prompt that the category belongs to")
        found.update(dict.fromkeys(names, category))
    return found


def contest(given: Sequence[PolicyAnswers]) -> Contest:
    """Brings answers to the same prompts together, by the text of the instruction.

    Raises:
        DataError: fewer than two policies, a name that is there twice, or no instruction that all of them answer.
    """
    by_policy = {answers.policy: answers for answers in given}
    if len(by_policy) < len(given):
        names = [answers.policy for answers in given]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"two files hold answers of {twice!r}. Rename one generator, or leave one file out.")
    if len(given) < 2:
        raise DataError(f"{len(given)} policies cannot be compared; give two files of answers at least.")
    first, *others = given
    shared = tuple(prompt for prompt in first.outputs if all(prompt in other.outputs for other in others))
    if not shared:
        raise DataError(f"no instruction is answered by all of {', '.join(by_policy)}. Do the files belong together?")
    everything = {prompt for answers in given for prompt in answers.outputs}
    categories = {prompt: category for answers in given for prompt, category in answers.categories.items()}
    return Contest(
        policies=tuple(by_policy),
        prompts=shared,
        categories=tuple(categories.get(prompt, "") for prompt in shared),
        outputs={name: [answers.outputs[prompt] for prompt in shared] for name, answers in by_policy.items()},
        rewards={
            name: [answers.rewards[prompt] for prompt in shared]
            for name, answers in by_policy.items()
            if answers.rewards
        },
        left_out=len(everything) - len(shared),
    )


# ----------------------------------------------------------------------------- length and style


class Style(NamedTuple):
    """Of one answer, or of several on average."""

    words: float
    headers: float
    list_items: float
    bold: float


def style_of(output: str) -> Style:
    counts = {kind: sum(by_form.values()) for kind, by_form in markdown_counts(output).items()}
    return Style(len(output.split()), counts["header_count"], counts["list_count"], counts["bold_count"])


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
    pairs: Mapping[tuple[str, str], Sequence[float | None]]
    """(policy, other) -> [N] probability that the policy's answer is the better one; None without a verdict.

    Both directions are there.
    """
    margins: Mapping[tuple[str, str], Sequence[float]]
    """(policy, other) -> [N] by how much the policy's answer is better: in reward, or P - 1/2."""


def reward_verdicts(of: Contest) -> list[Verdicts]:
    """The larger reward wins, a tie is half a win; nothing where fewer than two policies have rewards."""
    means = {policy: [score.mean for score in scores] for policy, scores in of.rewards.items()}
    if len(means) < 2:
        return []
    margins = {(a, b): [x - y for x, y in zip(means[a], means[b], strict=True)] for a in means for b in means if a != b}
    pairs = {pair: [0.5 * (1 + (gap > 0) - (gap < 0)) for gap in gaps] for pair, gaps in margins.items()}
    return [Verdicts(judge=REWARD_MODEL, pairs=pairs, margins=margins)]


def judged_verdicts(of: Contest, judged: Sequence[Annotations]) -> list[Verdicts]:
    """The verdicts of files that judge_benchmark wrote, by judge.

    Raises:
        DataError: a judged model, or its baseline, or an instruction is not in the contest; or a pair of models is
            judged twice by the same judge.
    """
    by_judge: dict[str, dict[tuple[str, str], list[float | None]]] = {}
    for file in judged:
        for name in (file.model, file.baseline):
            if name not in of.policies:
                raise DataError(
                    f"{file.judge!r} compares {file.model!r} with {file.baseline!r}, and there are no answers of "
                    f"{name!r}. Give its file of answers as well."
                )
        preferences = dict(zip(file.instructions, file.win_probabilities(), strict=True))
        unknown = [text for text in preferences if text not in set(of.prompts)]
        if unknown:
            raise DataError(
                f"{len(unknown)} instructions on which {file.judge!r} compared {file.model!r} with {file.baseline!r} "
                f"are not answered by all policies, as {unknown[0]!r:.80}. Give the answers that were judged."
            )
        ours = [preferences.get(prompt) for prompt in of.prompts]
        pairs = by_judge.setdefault(file.judge, {})
        if (file.model, file.baseline) in pairs:
            raise DataError(f"{file.judge!r} compares {file.model!r} with {file.baseline!r} in two files. Give one.")
        pairs[file.model, file.baseline] = ours
        pairs[file.baseline, file.model] = [None if p is None else 1.0 - p for p in ours]
    return [
        Verdicts(
            judge=judge,
            pairs=pairs,
            margins={pair: [0.0 if p is None else p - 0.5 for p in verdicts] for pair, verdicts in pairs.items()},
        )
        for judge, pairs in by_judge.items()
    ]


def win_matrix(of: Contest, verdicts: Verdicts) -> dict[str, dict[str, Metrics]]:
    """matrix[a][b]: how often a beats b, over all prompts with a verdict; no entry for a pair that was not judged."""
    everything = range(len(of.prompts))
    return {
        a: {b: head_to_head(of, verdicts, (a, b), everything) for b in of.policies if (a, b) in verdicts.pairs}
        for a in of.policies
    }


def head_to_head(of: Contest, verdicts: Verdicts, pair: tuple[str, str], prompts: Sequence[int]) -> Metrics:
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
        **win_rate_of_preferences([p for i in decided if (p := verdicts.pairs[pair][i]) is not None]),
        "words": _mean([a.words - b.words for a, b in zip(ours, theirs, strict=True)]),
        "markdown": _mean([sum(a[1:]) - sum(b[1:]) for a, b in zip(ours, theirs, strict=True)]),
    }


def breakdown(of: Contest, verdicts: Verdicts, pair: tuple[str, str]) -> list[tuple[str, Metrics]]:
    """(group of prompts, `head_to_head` on it): all, each category where there are several, and by length.

    A policy that wins where its answers are longer, and loses where they are shorter, wins by length.
    """
    everything = range(len(of.prompts))
    groups: dict[str, Sequence[int]] = {"all prompts": everything}
    if len(set(of.categories)) > 1:
        for category in sorted(set(of.categories)):
            groups[category or "no category"] = [i for i in everything if of.categories[i] == category]
    lengths = [tuple(len(of.outputs[name][i].split()) for name in pair) for i in everything]
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


# ----------------------------------------------------------------------------- the page


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
    of: Contest,
    *,
    judged: Sequence[Annotations] = (),
    leaderboard: Sequence[LeaderboardRow] = (),
    notes: Sequence[str] = (),
    objectives: Sequence[str] = (),
) -> str:
    """The page as HTML; it fetches nothing.

    Args:
        judged: files of judge_benchmark about these policies.
        leaderboard: what the benchmarks' own statistics say of them, with `notes` to print beside it.
        objectives: their names, in the order of the reward model.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.benchmark", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    verdicts = [*reward_verdicts(of), *judged_verdicts(of, judged)]
    by = orders(of, verdicts)
    worst_first = sorted(range(len(of.prompts)), key=lambda i: by[0].margins[i]) if by else range(len(of.prompts))
    return environment.get_template("comparison.html.j2").render(
        policies=of.policies,
        left_out=of.left_out,
        scored=sorted(of.rewards),
        leaderboard=leaderboard,
        notes=notes,
        matrices=[(said.judge, win_matrix(of, said)) for said in verdicts],
        summaries=summaries(of),
        breakdowns=[
            (said.judge, policy, other, breakdown(of, said, (policy, other)))
            for said in verdicts
            for policy, other in said.pairs
            if of.policies.index(other) < of.policies.index(policy)
        ],
        mean_contributions=mean_contributions(of, objectives),
        orders=by,
        categories=sorted(set(of.categories)) if len(set(of.categories)) > 1 else [],
        rows=[
            {
                "prompt": of.prompts[i],
                "category": of.categories[i],
                "margins": [order.margins[i] for order in by],
                "answers": [
                    {
                        "policy": policy,
                        "output": of.outputs[policy][i],
                        "words": len(of.outputs[policy][i].split()),
                        "score": score,
                        "parts": contributions(score, objectives, of=policy) if score else [],
                    }
                    for policy in of.policies
                    for score in [of.rewards[policy][i] if policy in of.rewards else None]
                ],
                "verdicts": [
                    (said.judge, policy, other, p)
                    for said in verdicts
                    if said.judge != REWARD_MODEL
                    for (policy, other), preferences in said.pairs.items()
                    for p in [preferences[i]]
                    if of.policies.index(other) < of.policies.index(policy)
                ],
            }
            for i in worst_first
        ],
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
