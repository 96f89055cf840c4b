"""Arena-Hard's win rate against the baseline, by a Bradley-Terry model of all battles.

Source: Li et al. 2024, arXiv:2406.11939, and its code (github.com/lmarena/arena-hard-auto), whose numbers these are.
All rates are in percent, as on the leaderboard.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from pipeline.benchmark.arena_hard.battle_table import BattleTable, Floats
from pipeline.benchmark.arena_hard.battles import Battle
from pipeline.errors import NumericsError
from pipeline.records import Metrics

RIDGE = 1e-6
"""Keeps the rate of a model that wins every battle finite. It changes a rate over 1,000 battles by < 1e-6 points."""

MAX_NEWTON_STEPS = 1000


def bradley_terry_win_rates(
    battles: Sequence[Battle], baseline: str, *, seed: int = 0, num_resamples: int = 1000
) -> dict[str, Metrics]:
    """Bradley-Terry win rate of every model against the baseline, in percent.

    WR_m = 100 sigmoid(theta_m - theta_baseline),
    theta  = argmin sum_i w_i BCE(sigmoid(theta_{a_i} - theta_{b_i}), y_i)

    If every opponent is the baseline, this is the weighted mean of (wins + ties/2). Upstream reports
    Elo = 400 theta / ln 10, anchored at the baseline, which gives the same rate.

    Args:
        seed: seed of the bootstrap.
        num_resamples: bootstrap samples per interval (upstream: 100).

    Returns:
        Model -> `win_rate`; `low`, `high`: 95% percentile bootstrap over *questions*; `upstream_low`, `upstream_high`:
        the same over battles, as on the leaderboard; `battles`: the sum of weights. The intervals over battles are 1.5
        to 2 times too narrow on public judgments, because the two games of a question and the three copies of a clear
        win are not independent.

    Raises:
        DataError: there is no battle, or no chain of battles connects some model with the baseline.
    """
    table = BattleTable(battles, baseline)
    num_models = len(table.models)
    pairs, pair_of = np.unique(table.a * num_models + table.b, return_inverse=True)
    players = one_hot(pairs // num_models, num_models) - one_hot(pairs % num_models, num_models)

    def rates(weights: Floats) -> Floats:
        # The likelihood depends on a pair of models only through its number of battles and its share of wins.
        played: Floats = np.bincount(pair_of, weights, len(pairs)).astype(np.float64)
        won = np.bincount(pair_of, weights * table.outcomes, len(pairs))
        return percent_against_baseline(fit_logistic(players, won / np.maximum(played, 1), played, ridge=RIDGE))

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
        NumericsError: Newton's method does not converge.
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
        if moved < 1e-6:  # the remaining error is about the square of this
            return theta
    raise NumericsError(
        f"the logistic regression of {len(outcomes)} battles has not converged after {MAX_NEWTON_STEPS} Newton "
        "steps. Check that weights and style features are finite."
    )


def one_hot(numbers: NDArray[np.int_], size: int) -> Floats:
    """[R] numbers -> [R, size]."""
    return np.eye(size)[numbers]


def percent_against_baseline(logits: Floats) -> Floats:
    """Win rate of each model over the baseline, which is model 0."""
    return 100 * expit(logits - logits[0])
