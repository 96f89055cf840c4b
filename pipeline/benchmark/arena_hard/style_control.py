"""Arena-Hard's style control: win rates with length and markdown held equal."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np

from pipeline.benchmark.arena_hard.battle_table import BattleTable, Floats
from pipeline.benchmark.arena_hard.battles import Battle
from pipeline.benchmark.arena_hard.win_rates import fit_logistic, one_hot, percent_against_baseline
from pipeline.errors import DataError
from pipeline.records import Metrics

SKLEARN_RIDGE = 0.5
"""Penalty of scikit-learn's default C = 1. Upstream doubles its rows: sum 2 w BCE + |theta|^2 / 2, halved here."""


@dataclass(frozen=True, kw_only=True)
class StyleFeatures:
    """The features that style control holds equal between two answers."""

    tokens: int
    headers: int
    lists: int
    bolds: int


@dataclass(frozen=True, kw_only=True)
class StyleControl:
    """Win rates with style held equal. All models are fitted together, so each rate depends on the whole pool."""

    models: dict[str, Metrics]
    coefficients: dict[str, float]
    """Style feature -> change of the log-odds per standard deviation of the gap."""


def markdown_counts(answer: str) -> dict[str, dict[str, int]]:
    """Counts of headers, list items and bold spans outside fenced code, under upstream's names.

    Upstream mishandles an answer in which the text of one code block occurs in another one. It counts 12 of the 3500
    public answers differently.
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


def style_features(answer: str, *, num_tokens: int) -> StyleFeatures:
    """The style of an answer. Upstream counts tokens with tiktoken in the encoding of gpt-3.5-turbo (v2: gpt-4o)."""
    counts = {kind: sum(by_form.values()) for kind, by_form in markdown_counts(answer).items()}
    return StyleFeatures(
        tokens=num_tokens,
        headers=counts["header_count"],
        lists=counts["list_count"],
        bolds=counts["bold_count"],
    )


def style_controlled_win_rates(
    battles: Sequence[Battle],
    styles: Mapping[tuple[str, str], StyleFeatures],
    baseline: str,
    *,
    centred: bool,
    seed: int = 0,
    num_resamples: int = 100,
) -> StyleControl:
    """Win rate at equal style: Bradley-Terry with the style gaps of the two answers as covariates.

    logit P(a wins) = ln 10 (c_a - c_b) + beta . s_ab,   WR_m = 100 sigmoid(ln 10 (c_m - c_baseline))
    s_ab,e = (g_e - centre_e) / sd_e,   g_e = (e_a - e_b) / (e_a + e_b + 1),   e in tokens, headers, lists, bolds

    with scikit-learn's default penalty (C = 1) on c and beta. These are the rules of v0.1.

    Args:
        styles: (model, question id) -> style, for every answer of the battles.
        centred: with True, as upstream, centre_e = mean_i g_e. A rate at s = 0 is then a rate at the *average* gap of
            the pool, so answers that are longer in all models still gain from it. The rate can be compared with
            published numbers (`sc_upstream`). With False, centre_e = 0, and the rate is that of two answers of equal
            style (`sc_uncentred`).

    Raises:
        DataError: there is no battle, no chain of battles connects some model with the baseline, or an answer has no
            style.
    """
    table = BattleTable(battles, baseline)
    gaps = _style_gaps(battles, styles)
    mean = np.average(gaps, axis=0, weights=table.weights)
    deviation = np.sqrt(np.average((gaps - mean) ** 2, axis=0, weights=table.weights))
    # A gap that never varies has deviation 0. The fit cannot use it, so its scale does not matter.
    scaled = (gaps - mean if centred else gaps) / np.where(deviation > 0, deviation, 1.0)
    num_models = len(table.models)
    players = one_hot(table.a, num_models) - one_hot(table.b, num_models)
    # ln 10 is Elo's unit. It matters here because the penalty applies to c.
    features = np.hstack([math.log(10) * players, scaled])

    def fit(weights: Floats) -> Floats:
        return fit_logistic(features, table.outcomes, weights, ridge=SKLEARN_RIDGE)

    def rates(weights: Floats) -> Floats:
        return percent_against_baseline(math.log(10) * fit(weights)[:num_models])

    betas = fit(table.weights)[num_models:]
    return StyleControl(
        models=table.with_intervals(rates, seed, num_resamples),
        coefficients=dict(zip((field.name for field in fields(StyleFeatures)), map(float, betas), strict=True)),
    )


def _style_gaps(battles: Sequence[Battle], styles: Mapping[tuple[str, str], StyleFeatures]) -> Floats:
    """[R, 4] gaps (e_a - e_b) / (e_a + e_b + 1) of each battle and feature."""

    def features_of(model: str, question_id: str) -> tuple[int, ...]:
        style = styles.get((model, question_id))
        if style is None:
            raise DataError(
                f"no answer of {model!r} to question {question_id!r} among the {len(styles)} answers given. "
                "Style control needs the answer files of every model and of the baseline."
            )
        return astuple(style)

    a = np.array([features_of(battle.model_a, battle.question_id) for battle in battles], dtype=np.float64)
    b = np.array([features_of(battle.model_b, battle.question_id) for battle in battles], dtype=np.float64)
    return (a - b) / (a + b + 1)
