"""AlpacaEval 2: the win rates of a judge's preferences, as they are and at equal length.

The official number of a model is its length-controlled (LC) win rate: the judge likes long answers, so a logistic
model of its preferences is fitted, and read off where both answers are equally long.

Source: Dubois et al. 2024, arXiv:2404.04475, with the constants of its reference implementation, alpaca_eval 0.6.6.
Where we differ: difficulties are joined on the instruction text, not on the row number, so a file that lacks an
instruction is not shifted (the official coefficients of phi-2, which lacks two, are those of shifted rows); what cannot
be a preference is refused instead of dropped.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from pipeline.data.files import Row, read_rows
from pipeline.errors import DataError, ShapeError

OFFICIAL_BASELINE = "gpt4_1106_preview"

# alpaca_eval 0.6.6, metrics/glm_winrate.py: 0.2 over two gamed baselines; the rest is handed to scikit-learn.
GAMED_ROW_WEIGHT = 0.2 / 2
FOLDS = 5
INVERSE_PENALTIES = np.logspace(-4, 4, 10)
# liblinear visits the coordinates in random order and stops early, so its draws are part of the official number: one
# stream per fold, over the penalties in order, as scikit-learn's LogisticRegressionCV draws them.
SOLVER_SEED = 123

FITTED_WITHOUT = {
    "length_controlled_minimal": "instruction difficulty and gamed rows (df_gamed.csv), which moves the 29 public "
    "models by 6.7 points on average and one by 27",
    "length_controlled_noreg": "gamed rows (df_gamed.csv), which moves the 29 public models by 1.2 points on average "
    "and one by 17",
}
"""Variant -> what it lacks and what that cost against the leaderboard; the difficulties were estimated ones."""


def win_rate(preferences: Sequence[float | None]) -> dict[str, float]:
    """Win rate of the model over the baseline, in percent, by the judge's preferences.

    WR = 100 * mean_i p_i,  p_i = preference_i - 1;    discrete WR = 100 * (wins + draws / 2) / n

    Args:
        preferences: [N] from 1 (the baseline is better for certain) to 2 (the model is). 0 is an old way to write a
            draw and is read as 1.5; None and NaN are verdicts that could not be parsed, and are left out.

    Returns:
        Under the names of the official leaderboard: `win_rate`, `standard_error` (of the mean, ddof 1) and
        `discrete_win_rate` in percent; `n_wins`, `n_wins_base`, `n_draws`, `n_total`; and `n_unparsed`, not in n_total.

    Raises:
        DataError: a value that is no preference, or no preference at all.
    """
    p = _win_probabilities(preferences)
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
class Annotations:
    """A judge's preferences between a baseline and a model; row i of every column is the same instruction.

    Raises:
        ShapeError: columns of different length.
        DataError: an instruction occurs twice.
    """

    baseline: str
    model: str
    instructions: Sequence[str]
    preferences: Sequence[float | None]
    """[N] as `win_rate` takes them."""
    baseline_lengths: Sequence[int]
    """[N] characters of the baseline's answers."""
    model_lengths: Sequence[int]
    """[N] characters of the model's answers."""
    judge: str = ""
    """The file's `annotator`; empty where it does not say."""

    def win_probabilities(self) -> list[float | None]:
        """[N] in [0, 1] that the model's answer is the better one; None without a verdict."""
        return [None if math.isnan(p) else float(p) for p in _win_probabilities(self.preferences)]

    def __post_init__(self) -> None:
        columns = (self.instructions, self.preferences, self.baseline_lengths, self.model_lengths)
        if len({len(column) for column in columns}) > 1:
            raise ShapeError(
                f"annotations of {self.model}: {len(self.instructions)} instructions, {len(self.preferences)} "
                f"preferences, {len(self.baseline_lengths)} and {len(self.model_lengths)} lengths. Give one per row."
            )
        repeated = [text for text, count in Counter(self.instructions).items() if count > 1]
        if repeated:
            raise DataError(
                f"annotations of {self.model}: {len(repeated)} instructions occur more than once, first "
                f"{_head(repeated[0])}. Keep one row of each: every instruction counts once."
            )


def read_annotations(path: Path) -> Annotations:
    """One model's `annotations.json`, as alpaca_eval writes it.

    Raises:
        DataError: names file and row: a row that is no annotated pair, is of another baseline, model or annotator than
            the first, or repeats an instruction.
    """
    rows = list(read_rows(str(path)))
    if not rows:
        raise DataError(f"{path} holds no annotated pairs")
    baseline, model, judge = _compared(rows[0])
    first: dict[str, Row] = {}
    for row in rows:
        if _compared(row) != (baseline, model, judge):
            raise DataError(
                f"{row.place}: {' / '.join(_compared(row))} stands in a file of {baseline} / {model} / {judge} "
                "(baseline / model / annotator). Give each its own file."
            )
        text = row.require("instruction", str)
        if first.setdefault(text, row) is not row:
            raise DataError(f"{row.place}: {_head(text)} is annotated already, in {first[text].place}. Keep one.")
    return Annotations(
        baseline=baseline,
        model=model,
        judge=judge,
        instructions=list(first),
        preferences=[_preference(row) for row in rows],
        baseline_lengths=[len(row.require("output_1", str)) for row in rows],
        model_lengths=[len(row.require("output_2", str)) for row in rows],
    )


def _compared(row: Row) -> tuple[str, str, str]:
    """Baseline, model and judge; old files do not name the judge."""
    judge = row.require("annotator", str) if "annotator" in row.values else ""
    return row.require("generator_1", str), row.require("generator_2", str), judge


def _preference(row: Row) -> float | None:
    """None and NaN are verdicts that nobody could parse."""
    if row.values.get("preference", "") is None:
        return None
    value = float(row.require("preference", (int, float)))
    if value == 0.0 or 1.0 <= value <= 2.0 or math.isnan(value):
        return value
    raise DataError(f"{row.place}, field 'preference': {value:g} is not in [1, 2]. Add 1 to win probabilities.")


@dataclass(frozen=True, kw_only=True)
class GamedRows:
    """The baseline against itself when told to be verbose or concise: no change of quality, only of length.

    They hold the length effect in place where a model's own answers cannot tell it from quality.
    """

    win_probabilities: Sequence[float]
    """[G] in [0, 1]; NaN rows are left out."""
    length_differences: Sequence[float]
    """[G] baseline minus gamed, over the standard deviation of that difference."""
    difficulty: Sequence[float]
    """[G] of the row's instruction."""


def read_gamed_rows(path: Path) -> tuple[GamedRows, list[float]]:
    """`df_gamed.csv` of the data set tatsu-lab/alpaca_eval: its rows, and the difficulty of instruction 0, 1, ...

    Raises:
        DataError: a column or an instruction number is missing, or a cell is no number.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        difficulty = {int(row["index"]): float(row["instruction_difficulty"]) for row in reversed(rows)}
        gamed = GamedRows(
            win_probabilities=[float(row["preference"] or "nan") for row in rows],
            length_differences=[float(row["std_delta_len"]) for row in rows],
            difficulty=[float(row["instruction_difficulty"]) for row in rows],
        )
        return gamed, [difficulty[index] for index in range(len(difficulty))]
    except (KeyError, ValueError) as error:
        raise DataError(f"{path} is no df_gamed.csv of AlpacaEval: {error!r}") from error


class Coefficients(NamedTuple):
    """logit p = length * tanh(d) + difficulty * gamma + not_gamed; a column each of the official weights file."""

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
    """What the win rate would be, in percent, if the answers were as long as the baseline's.

    LC = 100 * mean_i sigmoid(b gamma_i + c),  with (a, b, c) of `fit_coefficients`; 50 by definition for the baseline
    against itself.

    Args:
        annotations: N judged instructions.
        difficulty: gamma by instruction text; or gamma of row 0, 1, ..., which is refused unless there is one per row;
            or None to leave the term out.
        gamed: rows that keep the length effect in place (`read_gamed_rows`). Without them a model whose answers are
            all about equally long gets an LC win rate that is too high by many points.
        coefficients: fitted elsewhere, for instance the official ones of a leaderboard model; None fits them here.

    Returns:
        All of `win_rate`, and
        `length_controlled_winrate` and `lc_standard_error` in percent (the error of the mean over instructions; that
        of the coefficients is not in it, as on the leaderboard);
        `variant`: AlpacaEval's name for the terms of the fit, or "given" for given coefficients;
        `coefficients`: by name;
        `extreme_change`: the correction is so large that the fit may have failed;
        `notes`: sentences to print beside the number.

    Raises:
        DataError: as `win_rate` and `fit_coefficients`; an instruction has no difficulty; or the difficulty is missing
            that `gamed` or `coefficients` need.
    """
    if difficulty is None and (gamed is not None or (coefficients is not None and coefficients.difficulty != 0.0)):
        raise DataError("gamed rows and coefficients stand on AlpacaEval's instruction difficulty. Give it as well.")
    result: dict[str, Any] = win_rate(annotations.preferences)
    gamma = None if difficulty is None else _difficulty_of(annotations, difficulty)
    if annotations.model == annotations.baseline:
        coefficients, variant = Coefficients(0.0, 0.0, 0.0), "given"
    elif coefficients is not None:
        variant = "given"
    else:
        coefficients = fit_coefficients(annotations, gamma, gamed)
        variant = "length_controlled_" + ("minimal" if gamma is None else "noreg" if gamed is None else "v1")
    p = preferences_at_equal_length(coefficients, np.zeros(len(annotations.instructions)) if gamma is None else gamma)
    lc = 100.0 * float(p.mean())
    extreme = is_extreme_change(result["win_rate"], lc)
    notes = []
    if gamma is not None:
        notes.append(
            f"Instruction difficulty and gamed rows are AlpacaEval's, measured with {OFFICIAL_BASELINE} as the "
            "baseline and GPT-4 Turbo as the judge."
        )
        if annotations.baseline != OFFICIAL_BASELINE:
            notes.append(
                f"The baseline here is {annotations.baseline}: no number of the leaderboard compares with these."
            )
    if variant in FITTED_WITHOUT:
        notes.append(f"LC is not the leaderboard's: it is fitted without {FITTED_WITHOUT[variant]}.")
    if extreme:
        notes.append(
            f"The length-controlled win rate {lc:.1f} is far from the raw one, {result['win_rate']:.1f}: the fit may "
            "have failed. Look at the coefficients, and fit with gamed rows if there were none."
        )
    return result | {
        "length_controlled_winrate": lc,
        "lc_standard_error": 100.0 * _standard_error(p),
        "variant": variant,
        "coefficients": coefficients._asdict(),
        "extreme_change": extreme,
        "notes": notes,
    }


def fit_coefficients(
    annotations: Annotations, difficulty: np.ndarray | None, gamed: GamedRows | None = None
) -> Coefficients:
    """The logistic model of the judge's preferences, by L1-penalised maximum likelihood.

    logit p_i = a tanh(d_i) + b gamma_i + c [i not gamed],  d_i = (|baseline_i| - |model_i|) / std(|baseline| - |model|)

    with |.| in characters and the standard deviation over the model's rows (ddof 1). A soft label p is two rows, y = 1
    with weight p and y = 0 with weight 1 - p. The strength of the penalty minimises the mean log loss of 5 folds,
    which keep the two halves of a row together.

    On the same rows this is alpaca_eval's own fit to 1e-6. How near it comes to the leaderboard depends on the rows:
    on 29 models with public preferences, with estimated difficulties and a stand-in for the gamed rows (the official
    ones are on the hub alone), LC is off by 0.44 points on average; without gamed rows by 1.19.

    Args:
        annotations: N judged instructions; those without a preference count for the standard deviation only.
        difficulty: [N] gamma, or None to leave out b.
        gamed: rows without c, at a tenth of the weight.

    Raises:
        ShapeError: not one difficulty per row.
        DataError: fewer annotated rows than folds, all length differences are equal, or one side wins every row for
            certain and there are no gamed rows.
    """
    p = _win_probabilities(annotations.preferences)
    differences = np.asarray(annotations.baseline_lengths, float) - np.asarray(annotations.model_lengths, float)
    if np.count_nonzero(~np.isnan(p)) < FOLDS:
        raise DataError(
            f"annotations of {annotations.model}: a length-controlled win rate is fitted in {FOLDS} folds, and "
            f"{np.count_nonzero(~np.isnan(p))} rows have a preference. Annotate more, or report `win_rate` alone."
        )
    spread = differences.std(ddof=1)
    if spread == 0.0:
        raise DataError(
            f"annotations of {annotations.model}: every answer is {-differences[0]:.0f} characters longer than the "
            "baseline's, so length and quality cannot be told apart. Report `win_rate` alone."
        )
    columns = [np.tanh(differences / spread), np.ones(len(p))]
    if difficulty is not None:
        if len(difficulty) != len(p):
            raise ShapeError(f"{len(difficulty)} difficulties for {len(p)} annotated rows. Give one per row.")
        columns.insert(1, difficulty)
    features, weights = np.stack(columns, axis=1), np.ones(len(p))
    if gamed is not None:
        # Gamed rows first, and below y = 1 before y = 0: the folds and the solver's path depend on the order.
        no_quality = np.zeros(len(gamed.difficulty))
        gamed_features = np.column_stack([np.tanh(gamed.length_differences), gamed.difficulty, no_quality])
        features = np.concatenate([gamed_features, features])
        weights = np.concatenate([np.full(len(gamed.difficulty), GAMED_ROW_WEIGHT), weights])
        p = np.concatenate([gamed.win_probabilities, p])
    parsed = ~np.isnan(p)
    if p[parsed].max() == 0.0 or p[parsed].min() == 1.0:
        raise DataError(
            f"annotations of {annotations.model}: every preference is {p[parsed][0] + 1.0:g}, so the likelihood has no "
            "maximum. Report `win_rate` alone, or fit with gamed rows."
        )
    found = _fit_soft_logistic(features[parsed], p[parsed], weights[parsed])
    return Coefficients(found[0], 0.0 if difficulty is None else found[1], found[-1])


def preferences_at_equal_length(coefficients: Coefficients, difficulty: np.ndarray) -> np.ndarray:
    """[N] probabilities that the model wins at d = 0: sigmoid(b gamma_i + c). AlpacaEval's `glm_preference`."""
    return np.exp(-np.logaddexp(0.0, -(coefficients.difficulty * difficulty + coefficients.not_gamed)))


def is_extreme_change(raw: float, length_controlled: float) -> bool:
    """Whether the two win rates, in percent, differ by over 10 points and over a quarter of the room on that side."""
    room = raw if length_controlled < raw else 100.0 - raw
    return abs(length_controlled - raw) > max(10.0, room / 4.0)


# ----------------------------------------------------------------------------- parts


def _win_probabilities(preferences: Sequence[float | None]) -> np.ndarray:
    """[N] preference - 1, in [0, 1]; NaN where there is none."""
    values = np.array([math.nan if value is None else value for value in preferences], dtype=float)
    values[values == 0.0] = 1.5
    [wrong] = np.nonzero((values < 1.0) | (values > 2.0))
    if wrong.size:
        raise DataError(
            f"preference {values[wrong[0]]:g} in row {wrong[0]} ({wrong.size} like it): AlpacaEval's run from "
            "1 (baseline) to 2 (model), 0 or 1.5 is a draw. Add 1 to win probabilities."
        )
    return values - 1.0


def _standard_error(values: np.ndarray) -> float:
    """Of the mean, ddof 1; NaN of a single value."""
    return float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else math.nan


def _difficulty_of(annotations: Annotations, difficulty: Mapping[str, float] | Sequence[float]) -> np.ndarray:
    """[N] difficulty of every row: by its instruction text where texts are given, else by position."""
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
            f"{_head(unknown[0])}. AlpacaEval's 805 instructions have one; for others leave the term out with None."
        )
    return np.array([difficulty[text] for text in annotations.instructions], float)


def _fit_soft_logistic(features: np.ndarray, p: np.ndarray, weights: np.ndarray) -> list[float]:
    """Coefficients of logit p = features @ coefficients; [M, F], labels [M] in [0, 1], row weights [M]."""
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


def _head(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
