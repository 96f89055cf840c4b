"""Arena-Hard: from verdicts to a win rate against the baseline, plain and with style held equal.

Source: Li et al. 2024, arXiv:2406.11939, and its code (github.com/lmarena/arena-hard-auto), whose numbers these are.
Two editions of that code are in use and differ in small rules; `Rules` names which one applies. All rates are in
percent, as on the leaderboard.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from pipeline.errors import DataError, NumericsError
from pipeline.records import Metrics

Rules = Literal["v0.1", "v2"]
Floats = NDArray[np.float64]

LABEL = re.compile(r"\[\[([AB<>=]+)\]\]")
LABEL_IN_SINGLE_BRACKETS = re.compile(r"\[([AB<>=]+)\]")

_OUTCOMES_V0_1 = {"A>>B": (1.0, 3), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, 3)}
OUTCOMES: Mapping[Rules, Mapping[str, tuple[float, int]]] = {
    "v0.1": _OUTCOMES_V0_1,
    "v2": _OUTCOMES_V0_1 | {"A<<B": (0.0, 3), "A<B": (0.0, 1), "B=A": (0.5, 1), "B<A": (1.0, 1), "B<<A": (1.0, 3)},
}
"""Verdict -> (share of the win that goes to assistant A, weight): a clear win counts three times."""

RIDGE = 1e-6
"""Keeps a model that wins every battle finite (99.99..); moves a rate of 1,000 battles by less than 1e-6 points."""

MAX_NEWTON_STEPS = 1000

SKLEARN_RIDGE = 0.5
"""scikit-learn's default C = 1 on upstream's rows, which it doubles: sum 2 w BCE + |theta|^2 / 2, halved."""


# ----------------------------------------------------------------------------- verdicts and battles


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """Two games of one model against the baseline on one question."""

    question_id: str
    model: str
    baseline: str
    judge: str
    verdicts: tuple[str | None, str | None]
    """Game 1 shows the baseline as assistant A, game 2 the model; None where the judge gave no label."""


@dataclass(frozen=True, kw_only=True)
class Battle:
    """One decided game."""

    question_id: str
    model_a: str
    model_b: str
    outcome: float
    """1 when model_a won, 0 when model_b did, 0.5 for a tie."""
    weight: int
    """As many rows as upstream's battle files repeat it."""


def parse_verdict(judgment: str, rules: Rules) -> str | None:
    """The label the judge ended with, None where there is none.

    v0.1 accepts [[label]] and refuses a judgment with several different ones; where it finds none at all, its judge is
    asked once more. v2 takes the last [[label]] of the upper-cased text, else the last [label], and never asks again.
    """
    if rules == "v0.1":
        labels = set(LABEL.findall(judgment))
        return labels.pop() if len(labels) == 1 else None
    shouted = judgment.upper()
    found = LABEL.findall(shouted) or LABEL_IN_SINGLE_BRACKETS.findall(shouted)
    return found[-1] if found else None


def to_battles(judgments: Sequence[Judgment], rules: Rules) -> list[Battle]:
    """Battles with the baseline as model_a. A failed game is dropped alone by v0.1, with its whole question by v2."""
    battles = []
    for judgment in judgments:
        games = [OUTCOMES[rules].get(verdict or "") for verdict in judgment.verdicts]
        if rules == "v2" and None in games:
            continue
        for baseline_is_a, game in zip((True, False), games, strict=True):
            if game is not None:
                share_of_a, weight = game
                battles.append(
                    Battle(
                        question_id=judgment.question_id,
                        model_a=judgment.baseline,
                        model_b=judgment.model,
                        outcome=share_of_a if baseline_is_a else 1.0 - share_of_a,
                        weight=weight,
                    )
                )
    return battles


def count_failures(judgments: Sequence[Judgment], rules: Rules) -> dict[str, int]:
    """Model -> games without a verdict that the rules know."""
    failures = dict.fromkeys((judgment.model for judgment in judgments), 0)
    for judgment in judgments:
        failures[judgment.model] += sum(verdict not in OUTCOMES[rules] for verdict in judgment.verdicts)
    return failures


# ----------------------------------------------------------------------------- win rate


def win_rate(
    battles: Sequence[Battle], baseline: str, *, seed: int = 0, num_resamples: int = 1000
) -> dict[str, Metrics]:
    """Bradley-Terry win rate of every model against the baseline, in percent.

    WR_m = 100 sigmoid(theta_m - theta_baseline),
    theta  = argmin sum_i w_i BCE(sigmoid(theta_{a_i} - theta_{b_i}), y_i)

    Where every opponent is the baseline, this is the weighted mean of (wins + ties/2). Upstream's Elo is
    400 theta / ln 10, anchored at the baseline; the rate is the same.

    Args:
        seed: of the bootstrap.
        num_resamples: bootstrap samples per interval (upstream: 100).

    Returns:
        Model -> `win_rate`; `low`, `high`: 95% percentile bootstrap over *questions*; `upstream_low`, `upstream_high`:
        over battles, as the leaderboard prints. The latter are 1.5 to 2 times too narrow on public judgments: the two
        games of a question and the three copies of a clear win are not independent. `battles`: the sum of weights.

    Raises:
        DataError: no battle, or a model that no chain of battles joins to the baseline.
    """
    table = _Table(battles, baseline)
    num_models = len(table.models)
    pairs, pair_of = np.unique(table.a * num_models + table.b, return_inverse=True)
    players = _one_hot(pairs // num_models, num_models) - _one_hot(pairs % num_models, num_models)

    def rates(weights: Floats) -> Floats:
        # The likelihood knows a pair of models only by its battles and its share of wins.
        played: Floats = np.bincount(pair_of, weights, len(pairs)).astype(np.float64)
        won = np.bincount(pair_of, weights * table.outcomes, len(pairs))
        return _against_baseline(fit_logistic(players, won / np.maximum(played, 1), played, ridge=RIDGE))

    metrics = table.with_intervals(rates, seed, num_resamples)
    battles_of = np.bincount(table.a, table.weights, num_models) + np.bincount(table.b, table.weights, num_models)
    for model, total in zip(table.models, battles_of, strict=True):
        if model != baseline:
            metrics[model]["battles"] = float(total)
    return metrics


def fit_logistic(features: Floats, outcomes: Floats, weights: Floats, *, ridge: float) -> Floats:
    """theta = argmin sum_i w_i [ log(1 + exp(x_i theta)) - y_i x_i theta ] + ridge/2 |theta|^2, without intercept.

    Args:
        features: [R, F].
        outcomes: [R] in [0, 1]; a tie is 0.5, which equals one win and one loss of half the weight.
        weights: [R] >= 0.
        ridge: > 0, so that the minimum is unique and finite.

    Returns:
        [F], by Newton's method.

    Raises:
        NumericsError: no convergence.
    """
    theta = np.zeros(features.shape[1])
    for _ in range(MAX_NEWTON_STEPS):
        p = expit(features @ theta)
        gradient = features.T @ (weights * (p - outcomes)) + ridge * theta
        hessian = (features.T * (weights * p * (1 - p))) @ features + ridge * np.eye(len(theta))
        step = np.linalg.solve(hessian, gradient)
        # |l'''| <= l'' for the logistic loss: a step that moves no logit by more than 1 always lowers it.
        moved = np.abs(features @ step).max()
        theta -= step / max(1.0, moved)
        if moved < 1e-6:  # and the error left is its square
            return theta
    raise NumericsError(
        f"the logistic regression of {len(outcomes)} battles has not settled after {MAX_NEWTON_STEPS} Newton steps. "
        "Check weights and style features for numbers that are not finite."
    )


# ----------------------------------------------------------------------------- style control


@dataclass(frozen=True, kw_only=True)
class Style:
    """What style control holds equal in two answers."""

    tokens: int
    headers: int
    lists: int
    bolds: int


@dataclass(frozen=True, kw_only=True)
class StyleControl:
    """Win rates with style held equal. They depend on the whole pool of models, which is fitted together."""

    models: dict[str, Metrics]
    coefficients: dict[str, float]
    """Style feature -> change of the log-odds per standard deviation of its gap."""


def markdown_counts(answer: str) -> dict[str, dict[str, int]]:
    """Headers, list items and bold spans outside fenced code, by kind, under upstream's names.

    Upstream also deletes the text of one code block inside the next, and then misses that one: it counts 12 of the
    3500 public answers differently.
    """
    text = re.sub(r"```[^`]*```", "``````", answer)
    return {
        "header_count": {f"h{n}": len(re.findall(rf"^#{{{n}}}\s", text, re.MULTILINE)) for n in range(1, 7)},
        "list_count": {
            "ordered": len(re.findall(r"^\s*\d+\.\s", text, re.MULTILINE)),
            "unordered": len(re.findall(r"^\s*[-*+]\s", text, re.MULTILINE)),
        },
        "bold_count": {
            "**": len(re.findall(r"\*\*[^*\n]+\*\*", text)),
            "__": len(re.findall(r"__[^_\n]+__", text)),
        },
    }


def style_of(answer: str, *, num_tokens: int) -> Style:
    """The style of an answer; upstream counts its tokens with tiktoken, the encoding of gpt-3.5-turbo (v2: gpt-4o)."""
    counts = {kind: sum(by_form.values()) for kind, by_form in markdown_counts(answer).items()}
    return Style(
        tokens=num_tokens,
        headers=counts["header_count"],
        lists=counts["list_count"],
        bolds=counts["bold_count"],
    )


def style_controlled_win_rate(
    battles: Sequence[Battle],
    styles: Mapping[tuple[str, str], Style],
    baseline: str,
    *,
    centred: bool,
    seed: int = 0,
    num_resamples: int = 100,
) -> StyleControl:
    """Win rate at equal style: Bradley-Terry with the style gaps of the two answers as covariates.

    logit P(a wins) = ln 10 (c_a - c_b) + beta . s_ab,   WR_m = 100 sigmoid(ln 10 (c_m - c_baseline))
    s_ab,e = (g_e - centre_e) / sd_e,   g_e = (e_a - e_b) / (e_a + e_b + 1),   e in tokens, headers, lists, bolds

    with scikit-learn's default penalty (C = 1) on c and beta. This is the v0.1 edition.

    Args:
        styles: (model, question id) -> style of that answer; for every answer that fought.
        centred: upstream subtracts the mean gap of the pool (centre_e = mean_i g_e). A rate at s = 0 is then a rate at
            the pool's *average* gap: what all models have in longer answers stays in their favour, and the number
            depends on who else is in the pool. Comparable with published numbers (`sc_upstream`). With False,
            centre_e = 0 and the rate is that of two answers of equal style (`sc_uncentred`).

    Raises:
        DataError: no battle, a model that no chain of battles joins to the baseline, or an answer without its style.
    """
    table = _Table(battles, baseline)
    gaps = _style_gaps(battles, styles)
    mean = np.average(gaps, axis=0, weights=table.weights)
    deviation = np.sqrt(np.average((gaps - mean) ** 2, axis=0, weights=table.weights))
    # A gap that never varies would be divided by zero; it is no style difference that the fit could see.
    scaled = (gaps - mean if centred else gaps) / np.where(deviation > 0, deviation, 1.0)
    num_models = len(table.models)
    players = _one_hot(table.a, num_models) - _one_hot(table.b, num_models)
    # ln 10 is Elo's unit; it matters here because the penalty is on c.
    features = np.hstack([math.log(10) * players, scaled])

    def fit(weights: Floats) -> Floats:
        return fit_logistic(features, table.outcomes, weights, ridge=SKLEARN_RIDGE)

    def rates(weights: Floats) -> Floats:
        return _against_baseline(math.log(10) * fit(weights)[:num_models])

    betas = fit(table.weights)[num_models:]
    return StyleControl(
        models=table.with_intervals(rates, seed, num_resamples),
        coefficients=dict(zip((field.name for field in fields(Style)), map(float, betas), strict=True)),
    )


def _style_gaps(battles: Sequence[Battle], styles: Mapping[tuple[str, str], Style]) -> Floats:
    """[R, 4]: (e_a - e_b) / (e_a + e_b + 1) per battle and feature."""

    def of(model: str, question_id: str) -> tuple[int, ...]:
        style = styles.get((model, question_id))
        if style is None:
            raise DataError(
                f"no answer of {model!r} to question {question_id!r} among the {len(styles)} answers given. "
                "Style control needs the answer files of every model and of the baseline."
            )
        return astuple(style)

    a = np.array([of(battle.model_a, battle.question_id) for battle in battles], dtype=np.float64)
    b = np.array([of(battle.model_b, battle.question_id) for battle in battles], dtype=np.float64)
    return (a - b) / (a + b + 1)


# ----------------------------------------------------------------------------- battles as arrays


class _Table:
    """R battles as arrays; the baseline is model 0."""

    def __init__(self, battles: Sequence[Battle], baseline: str) -> None:
        players = {model for battle in battles for model in (battle.model_a, battle.model_b)}
        joined = _joined_to(baseline, battles)
        if not battles or players - joined:
            raise DataError(
                f"{len(battles)} battles do not compare {', '.join(sorted(players - joined)) or 'any model'} with the "
                f"baseline {baseline!r}. Give the baseline that the judge saw, and judgments with verdicts."
            )
        self.models = [baseline, *sorted(players - {baseline})]
        number = {model: n for n, model in enumerate(self.models)}
        self.a = np.array([number[battle.model_a] for battle in battles])
        self.b = np.array([number[battle.model_b] for battle in battles])
        self.outcomes = np.array([battle.outcome for battle in battles], dtype=np.float64)
        self.weights = np.array([battle.weight for battle in battles], dtype=np.float64)
        self.questions = np.unique([battle.question_id for battle in battles], return_inverse=True)[1]

    def with_intervals(self, rates: Callable[[Floats], Floats], seed: int, num_resamples: int) -> dict[str, Metrics]:
        """The rates of all battles and their two 95% bootstrap intervals, for every model but the baseline."""
        rng = np.random.default_rng(seed)
        by_question = [rates(self._resampled_questions(rng)) for _ in range(num_resamples)]
        by_battle = [rates(self._resampled_battles(rng)) for _ in range(num_resamples)]
        columns = {
            "win_rate": rates(self.weights),
            **dict(zip(("low", "high"), np.percentile(by_question, (2.5, 97.5), axis=0), strict=True)),
            **dict(zip(("upstream_low", "upstream_high"), np.percentile(by_battle, (2.5, 97.5), axis=0), strict=True)),
        }
        return {
            model: {key: float(column[n]) for key, column in columns.items()}
            for n, model in enumerate(self.models)
            if n > 0
        }

    def _resampled_questions(self, rng: np.random.Generator) -> Floats:
        num_questions = self.questions.max() + 1
        drawn = rng.multinomial(num_questions, np.full(num_questions, 1 / num_questions))
        return self.weights * drawn[self.questions]

    def _resampled_battles(self, rng: np.random.Generator) -> Floats:
        total = self.weights.sum()
        return rng.multinomial(int(total), self.weights / total).astype(np.float64)


def _joined_to(baseline: str, battles: Sequence[Battle]) -> set[str]:
    """Models that a chain of battles joins to the baseline."""
    edges = {frozenset((battle.model_a, battle.model_b)) for battle in battles}
    joined = {baseline}
    while grown := {model for edge in edges if edge & joined for model in edge} - joined:
        joined |= grown
    return joined


def _one_hot(numbers: NDArray[np.int_], size: int) -> Floats:
    return np.eye(size)[numbers]


def _against_baseline(logits: Floats) -> Floats:
    return 100 * expit(logits - logits[0])
