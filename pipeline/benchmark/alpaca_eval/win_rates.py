"""AlpacaEval 2: raw and length-controlled win rates of a judge's preferences.

The official number of a model is its length-controlled (LC) win rate, because judges prefer long answers. A logistic
model is fitted to the preferences, and the win rate is its prediction for answers of equal length.

Source: Dubois et al. 2024, arXiv:2404.04475, with the constants of its reference implementation, alpaca_eval 0.6.6.
We differ in two points. Difficulties are joined by instruction text, not by row number, so a missing instruction
shifts no other row. (phi-2 lacks two instructions, and its official coefficients come from shifted rows.) A value that
is not a preference is an error here; upstream drops it.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from pipeline.benchmark.alpaca_eval.annotations import Annotations, preferences_as_probabilities, quoted_start
from pipeline.errors import DataError, ShapeError

ALPACA_EVAL_BASELINE = "gpt4_1106_preview"

# Constants of alpaca_eval 0.6.6, metrics/glm_winrate.py. The gamed rows of two baselines share a weight of 0.2.
GAMED_ROW_WEIGHT = 0.2 / 2

FOLDS = 5

INVERSE_PENALTIES = np.logspace(-4, 4, 10)

# liblinear visits the coordinates in random order and stops early, so its random draws change the official number.
# Each fold has one random stream over the penalties in order, as in scikit-learn's LogisticRegressionCV.
SOLVER_SEED = 123

SAME_PREDICTION = 1e-9
"""Probabilities that differ by less are the same up to rounding."""

FITTED_WITHOUT = {
    "length_controlled_minimal": "instruction difficulty and gamed rows (df_gamed.csv), which moves the 29 public "
    "models by 6.7 points on average and one by 27",
    "length_controlled_noreg": "gamed rows (df_gamed.csv), which moves the 29 public models by 1.2 points on average "
    "and one by 17",
}
"""Variant -> what the fit lacks, and the resulting difference from the leaderboard (with estimated difficulties)."""


def raw_win_rate(preferences: Sequence[float | None]) -> dict[str, float]:
    """Win rate of the model over the baseline, in percent, without length control.

    WR = 100 * mean_i p_i,  p_i = preference_i - 1;    discrete WR = 100 * (wins + draws / 2) / n

    Args:
        preferences: [N] as in `preferences_as_probabilities`. Rows without a parsed verdict are left out.

    Returns:
        The names of the official leaderboard: `win_rate`, `standard_error` (of the mean, ddof 1) and
        `discrete_win_rate` in percent; `n_wins`, `n_wins_base`, `n_draws` and `n_total`. `n_unparsed` is ours and is
        not part of n_total.

    Raises:
        DataError: a value is not a preference, or no preference was parsed.
    """
    p = preferences_as_probabilities(preferences)
    unparsed = np.isnan(p)
    p = p[~unparsed]
    if not p.size:
        raise DataError(f"a win rate needs at least one parsed preference; all {unparsed.size} are missing")
    wins, losses = int((p > 0.5).sum()), int((p < 0.5).sum())
    draws = p.size - wins - losses
    return {
        "win_rate": 100.0 * float(p.mean()),
        "standard_error": 100.0 * _standard_error(p),
        "n_wins": wins,
        "n_wins_base": losses,
        "n_draws": draws,
        "n_total": p.size,
        "discrete_win_rate": 100.0 * (wins + draws / 2) / p.size,
        "n_unparsed": int(unparsed.sum()),
    }


@dataclass(frozen=True, kw_only=True)
class GamedRows:
    """Preferences between the baseline and itself, prompted to be verbose or concise.

    Only the length differs in these rows, not the quality. They identify the effect of length where the answers of a
    model cannot separate it from quality.
    """

    win_probabilities: Sequence[float]
    """[G] in [0, 1]; NaN rows are left out."""
    length_differences: Sequence[float]
    """[G] length of the baseline minus length of the gamed answer, in standard deviations of that difference."""
    difficulty: Sequence[float]
    """[G] difficulty of the row's instruction."""


def read_gamed_rows(path: Path) -> tuple[GamedRows, list[float]]:
    """`df_gamed.csv` of the data set tatsu-lab/alpaca_eval: the rows, and the difficulties of instructions 0, 1, ...

    Raises:
        DataError: a column or an instruction number is missing, or a cell is not a number or out of its range. Names
            the line of such a cell.
    """
    try:
        # "utf-8-sig": a byte-order mark, as spreadsheets write it, is no part of the first column's name.
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        difficulty = {int(row["index"]): float(row["instruction_difficulty"]) for row in reversed(rows)}
        gamed = GamedRows(
            win_probabilities=[float(row["preference"] or "nan") for row in rows],
            length_differences=[float(row["std_delta_len"]) for row in rows],
            difficulty=[float(row["instruction_difficulty"]) for row in rows],
        )
        by_index = [difficulty[index] for index in range(len(difficulty))]
    except (KeyError, ValueError) as error:
        raise DataError(f"{path} is no df_gamed.csv of AlpacaEval: {error!r}") from error
    columns = (gamed.win_probabilities, gamed.length_differences, gamed.difficulty)
    for line, (p, *finite) in enumerate(zip(*columns, strict=True), start=2):
        if not (math.isnan(p) or 0.0 <= p <= 1.0) or not all(map(math.isfinite, finite)):
            raise DataError(
                f"{path}, line {line}: preference {p:g} is not in [0, 1], or one of std_delta_len and "
                f"instruction_difficulty is not finite ({', '.join(f'{value:g}' for value in finite)})"
            )
    return gamed, by_index


class Coefficients(NamedTuple):
    """logit p = length * tanh(d) + difficulty * gamma + not_gamed; each is a column of the official weights file."""

    length: float
    difficulty: float
    not_gamed: float


def length_controlled_win_rate(
    annotations: Annotations,
    difficulty: Mapping[str, float] | Sequence[float] | None,
    *,
    gamed: GamedRows | None = None,
    coefficients: Coefficients | None = None,
) -> dict[str, Any]:
    """The win rate, in percent, that the model would have with answers as long as the baseline's.

    LC = 100 * mean_i sigmoid(b gamma_i + c),  with (a, b, c) of `fit_coefficients`. The baseline against itself has 50
    by definition.

    Args:
        annotations: N judged instructions.
        difficulty: gamma by instruction text, or the gammas of all N rows in order, or None to leave the term out.
        gamed: rows that identify the effect of length (`read_gamed_rows`). Without them, a model whose answers are all
            about equally long gets an LC win rate that is too high by many points.
        coefficients: fitted elsewhere, for example the official ones of a leaderboard model. None fits them here.

    Returns:
        All entries of `raw_win_rate`, and
        `length_controlled_winrate` and `lc_standard_error` in percent. The error is that of the mean over instructions.
        As on the leaderboard, it does not contain the error of the coefficients. The error is None where the fit
        predicts the same for every instruction, and both are None where every coefficient of the fit is 0: such a fit
        says nothing of the model, and its 50 is no measurement. Both are also None where there is no fit;
        `variant`: AlpacaEval's name for the terms of the fit, or "given" for given coefficients;
        `coefficients`: by name, None where there is no fit;
        `extreme_change`: whether the correction is so large that the fit may have failed;
        `notes`: sentences to print below the number.

    Raises:
        DataError: as `raw_win_rate`; an instruction has no difficulty; or `gamed` or
            `coefficients` need the difficulty, which is None.
    """
    if difficulty is None and (gamed is not None or (coefficients is not None and coefficients.difficulty != 0.0)):
        raise DataError("gamed rows and coefficients need AlpacaEval's instruction difficulty. Give it as well.")
    raw = raw_win_rate(annotations.preferences)
    gamma = None if difficulty is None else _difficulty_of(annotations, difficulty)
    variant = _variant(annotations, gamma, gamed, coefficients)
    notes = _notes(variant, annotations.baseline, has_difficulty=gamma is not None)
    if annotations.model == annotations.baseline:
        coefficients = Coefficients(0.0, 0.0, 0.0)
    elif coefficients is None:
        try:
            coefficients = fit_coefficients(annotations, gamma, gamed)
        except DataError as reason:
            notes.append(f"The length-controlled win rate is withheld, and the raw one stands: {reason}")
            return _withheld(raw, variant, notes)
    difficulties = np.zeros(len(annotations.instructions)) if gamma is None else gamma
    p = preferences_at_equal_length(coefficients, difficulties)
    return _corrected(raw, p, coefficients, variant, annotations.model, notes)


def _corrected(
    raw: Mapping[str, float], p: np.ndarray, coefficients: Coefficients, variant: str, model: str, notes: list[str]
) -> dict[str, Any]:
    """The result of a fit, with what to know of it; `p` [N] are the preferences at equal length."""
    length_controlled: float | None = 100.0 * float(p.mean())
    error: float | None = 100.0 * _standard_error(p)
    is_extreme = is_extreme_change(raw["win_rate"], 100.0 * float(p.mean()))
    if variant != "given" and not any(coefficients):
        length_controlled, error, is_extreme = None, None, False
        notes.append(
            f"The length-controlled win rate of {model} is withheld: the fit set every coefficient to 0, "
            "so it found nothing in these preferences. Annotate more, or report the win rate alone."
        )
    elif variant != "given" and np.ptp(p) < SAME_PREDICTION:
        error = None
        notes.append(
            f"The length-controlled win rate of {model} has no standard error: the fit predicts the same "
            "for every instruction."
        )
    if is_extreme:
        notes.append(
            f"The length-controlled win rate {length_controlled:.1f} is far from the raw one, {raw['win_rate']:.1f}: "
            "the fit may have failed. Look at the coefficients, and fit with gamed rows if there were none."
        )
    return {
        **raw,
        "length_controlled_winrate": length_controlled,
        "lc_standard_error": error,
        "variant": variant,
        "coefficients": coefficients._asdict(),
        "extreme_change": is_extreme,
        "notes": notes,
    }


def _variant(
    annotations: Annotations, gamma: np.ndarray | None, gamed: GamedRows | None, given: Coefficients | None
) -> str:
    """AlpacaEval's name for the terms of the fit, or "given": by the caller, or by definition."""
    if given is not None or annotations.model == annotations.baseline:
        return "given"
    terms = "minimal" if gamma is None else "noreg" if gamed is None else "v1"
    return f"length_controlled_{terms}"


def _withheld(raw: Mapping[str, float], variant: str, notes: list[str]) -> dict[str, Any]:
    """The result without a fit."""
    return {
        **raw,
        "length_controlled_winrate": None,
        "lc_standard_error": None,
        "variant": variant,
        "coefficients": None,
        "extreme_change": False,
        "notes": notes,
    }


def _notes(variant: str, baseline: str, *, has_difficulty: bool) -> list[str]:
    """What makes the number incomparable with the leaderboard, as sentences."""
    notes = []
    if has_difficulty:
        notes.append(
            f"Instruction difficulty and gamed rows are AlpacaEval's, measured with {ALPACA_EVAL_BASELINE} as the "
            "baseline and GPT-4 Turbo as the judge."
        )
        if baseline != ALPACA_EVAL_BASELINE:
            notes.append(f"The baseline here is {baseline}: these numbers cannot be compared with the leaderboard.")
    if variant in FITTED_WITHOUT:
        notes.append(f"LC is not the leaderboard's: it is fitted without {FITTED_WITHOUT[variant]}.")
    return notes


def fit_coefficients(
    annotations: Annotations, difficulty: np.ndarray | None, gamed: GamedRows | None = None
) -> Coefficients:
    """The logistic model of the judge's preferences, by L1-penalised maximum likelihood.

    logit p_i = a tanh(d_i) + b gamma_i + c [i not gamed],  d_i = (|baseline_i| - |model_i|) / std(|baseline| - |model|)

    Lengths |.| are in characters, and the standard deviation is over the model's rows (ddof 1). A soft label p becomes
    two rows: y = 1 with weight p, and y = 0 with weight 1 - p. The strength of the penalty minimises the mean log loss
    over 5 folds. The two halves of a row are in the same fold.

    On the same rows, this equals alpaca_eval's own fit to 1e-6. The distance to the leaderboard depends on the rows.
    We measured it on 29 models with public preferences, estimated difficulties and a replacement for the gamed rows,
    because the official ones are only on the hub. LC is off by 0.44 points on average; without gamed rows, by 1.19.

    Args:
        annotations: N judged instructions. Rows without a preference count only for the standard deviation.
        difficulty: [N] gamma, or None to leave out b.
        gamed: rows without c, at a tenth of the weight.

    Raises:
        ShapeError: there is not one difficulty per row.
        DataError: there are fewer annotated rows than folds, all length differences are equal, or one side certainly
            wins every row and there are no gamed rows.
    """
    p = preferences_as_probabilities(annotations.preferences)
    num_parsed = np.count_nonzero(~np.isnan(p))
    if num_parsed < FOLDS:
        raise DataError(
            f"annotations of {annotations.model}: a length-controlled win rate is fitted in {FOLDS} folds, and "
            f"{num_parsed} rows have a preference. Annotate more."
        )
    features, weights = _model_features(annotations, difficulty), np.ones(len(p))
    if gamed is not None:
        # Gamed rows first, and below y = 1 before y = 0: the folds and the solver's path depend on the order.
        zeros = np.zeros(len(gamed.difficulty))
        gamed_features = np.column_stack([np.tanh(gamed.length_differences), gamed.difficulty, zeros])
        features = np.concatenate([gamed_features, features])
        weights = np.concatenate([np.full(len(gamed.difficulty), GAMED_ROW_WEIGHT), weights])
        p = np.concatenate([gamed.win_probabilities, p])
    parsed = ~np.isnan(p)
    if p[parsed].max() == 0.0 or p[parsed].min() == 1.0:
        raise DataError(
            f"annotations of {annotations.model}: every preference is {p[parsed][0] + 1.0:g}, so the likelihood has no "
            "maximum. Fit with gamed rows."
        )
    fitted = _fit_soft_logistic(features[parsed], p[parsed], weights[parsed])
    return Coefficients(fitted[0], 0.0 if difficulty is None else fitted[1], fitted[-1])


def _model_features(annotations: Annotations, difficulty: np.ndarray | None) -> np.ndarray:
    """[N, 3] columns tanh(d_i), gamma_i and 1; without the gamma column where there is no difficulty."""
    differences = np.asarray(annotations.baseline_lengths, float) - np.asarray(annotations.model_lengths, float)
    spread = differences.std(ddof=1)
    if spread == 0.0:
        raise DataError(
            f"annotations of {annotations.model}: every answer is {-differences[0]:.0f} characters longer than the "
            "baseline's, so length and quality cannot be told apart."
        )
    columns = [np.tanh(differences / spread), np.ones(len(differences))]
    if difficulty is not None:
        if len(difficulty) != len(differences):
            raise ShapeError(f"{len(difficulty)} difficulties for {len(differences)} annotated rows. Give one per row.")
        columns.insert(1, difficulty)
    return np.stack(columns, axis=1)


def preferences_at_equal_length(coefficients: Coefficients, difficulty: np.ndarray) -> np.ndarray:
    """[N] probability that the model wins at d = 0: sigmoid(b gamma_i + c). AlpacaEval calls it `glm_preference`."""
    return np.exp(-np.logaddexp(0.0, -(coefficients.difficulty * difficulty + coefficients.not_gamed)))


def is_extreme_change(raw: float, length_controlled: float) -> bool:
    """Whether the correction is suspiciously large.

    Two win rates in percent change extremely if they differ by more than 10 points, and by more than a quarter of the
    room that the raw win rate had, up to 100 or down to 0.
    """
    room = raw if length_controlled < raw else 100.0 - raw
    return abs(length_controlled - raw) > max(10.0, room / 4.0)


def _standard_error(values: np.ndarray) -> float:
    """Standard error of the mean, ddof 1; NaN for a single value."""
    return float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else math.nan


def _difficulty_of(annotations: Annotations, difficulty: Mapping[str, float] | Sequence[float]) -> np.ndarray:
    """[N] difficulty of every row: looked up by instruction text in a mapping, taken by position from a sequence."""
    if not isinstance(difficulty, Mapping):
        if len(difficulty) != len(annotations.instructions):
            raise DataError(
                f"{len(difficulty)} difficulties by position for {len(annotations.instructions)} annotations of "
                f"{annotations.model}: rows may be shifted. Give the difficulties by instruction text."
            )
        return np.asarray(difficulty, float)
    unknown = [text for text in annotations.instructions if text not in difficulty]
    if unknown:
        raise DataError(
            f"annotations of {annotations.model}: {len(unknown)} instructions have no difficulty, first "
            f"{quoted_start(unknown[0])}. AlpacaEval's 805 "
            "instructions have one; for others leave the term out with None."
        )
    return np.array([difficulty[text] for text in annotations.instructions], float)


def _fit_soft_logistic(features: np.ndarray, p: np.ndarray, weights: np.ndarray) -> list[float]:
    """[F] coefficients of logit p = features @ coefficients, from features [M, F], labels p [M] and row weights [M]."""
    rows = len(p)
    x, y = np.concatenate([features, features]), np.repeat([1, 0], rows)
    soft = np.concatenate([p * weights, (1.0 - p) * weights])

    def fit(inverse_penalty: float, chosen: np.ndarray, random: np.random.RandomState) -> LogisticRegression:
        model = LogisticRegression(
            C=inverse_penalty, l1_ratio=1.0, solver="liblinear", fit_intercept=False, random_state=random
        )
        return model.fit(x[chosen], y[chosen], sample_weight=soft[chosen])

    losses = np.zeros((FOLDS, len(INVERSE_PENALTIES)))
    for fold, (training, heldout) in enumerate(GroupKFold(FOLDS).split(x, y, groups=np.tile(np.arange(rows), 2))):
        random = np.random.RandomState(SOLVER_SEED)
        heldout = heldout[heldout < rows]  # Both halves of a row have the same loss.
        for place, inverse_penalty in enumerate(INVERSE_PENALTIES):
            q = fit(inverse_penalty, training, random).predict_proba(features[heldout])[:, 1].clip(1e-15, 1 - 1e-15)
            log_loss = -(p[heldout] * np.log(q) + (1.0 - p[heldout]) * np.log(1.0 - q))
            losses[fold, place] = np.mean(weights[heldout] * log_loss)
    best = INVERSE_PENALTIES[losses.mean(axis=0).argmin()]
    return [float(value) for value in fit(best, np.arange(2 * rows), np.random.RandomState(SOLVER_SEED)).coef_[0]]
