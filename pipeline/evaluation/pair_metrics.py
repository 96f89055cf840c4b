"""Metrics of a reward model on preference pairs: accuracy, calibration, uncertainty and preference for length.

All functions take the margins r_chosen - r_rejected of B pairs and further columns as float64 arrays. The diagnostics
of training and the evaluation share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import ShapeError
from pipeline.records import Metrics

CALIBRATION_BINS = 15


@dataclass(frozen=True, kw_only=True)
class ScoredPairs:
    """B pairs as columns, each [B] float64."""

    chosen: np.ndarray
    """Posterior-mean reward of the chosen response."""
    rejected: np.ndarray
    margin_std: np.ndarray
    """Posterior standard deviation of their difference (`compare_rewards`); 0 for a model without error bars."""
    log_odds: np.ndarray
    """Calibrated logits of P(chosen is better), of the same sign as the margin."""
    length_gap: np.ndarray
    """Length of the chosen response minus length of the rejected one, in any unit."""

    def __post_init__(self) -> None:
        shapes = {name: column.shape for name, column in vars(self).items()}
        if len(set(shapes.values())) != 1 or self.chosen.ndim != 1 or not len(self.chosen):
            raise ShapeError(f"columns of scored pairs must have one length, at least 1; they are {shapes}")

    def take(self, rows: np.ndarray) -> ScoredPairs:
        return ScoredPairs(**{name: column[rows] for name, column in vars(self).items()})


def accuracy_metrics(margins: np.ndarray) -> Metrics:
    """Share of pairs whose chosen response has the higher reward.

    Returns:
        `accuracy` counts a tie as wrong, as RewardBench does; `accuracy_tie_half` counts it as one half; `ties` is the
        share of ties, which usually come from rewards rounded to bfloat16 (docs/method.md section 10).
    """
    ties = float((margins == 0).mean())
    accuracy = float((margins > 0).mean())
    return {"accuracy": accuracy, "accuracy_tie_half": accuracy + 0.5 * ties, "ties": ties}


def pair_diagnostics(pairs: ScoredPairs, *, answer_threshold: float | None) -> Metrics:
    """Calibration, uncertainty and preference for length.

    Args:
        answer_threshold: least |log-odds| of a confident answer (`RewardCalibration`); None measures no answers.

    Returns:
        `nll`, `brier`, `ece_uncalibrated` of p = sigmoid(margin); `calibrated/nll`, `calibrated/brier` and `ece`, the
        same for the calibrated log-odds; `ece_by_chance` (`calibration_error_by_chance`) of these; `mean_abs_margin`;
        `aurc/...` (`risk_coverage_area`) with |margin|, |log-odds| and, where there is one, the standard deviation of
        the margin as confidence;
        `aurc_gain/...`, the error rate minus that area, which is 0 for a confidence unrelated to the errors;
        `answered`, the share of confident answers, and `answered_error`, the share of them that is wrong, NaN without
        one;
        `prefers_longer`; `length_correlation`; the accuracy (a tie is one half) on pairs whose chosen response is the
        longer or the shorter one, NaN if there is no such pair.
    """
    margins = pairs.chosen - pairs.rejected
    correct = _correct(margins)
    errors = 1.0 - correct
    confidences = {"margin": np.abs(margins)}
    raw, calibrated = calibration(margins), calibration(pairs.log_odds)
    metrics = {
        "nll": raw["nll"],
        "brier": raw["brier"],
        "ece_uncalibrated": raw["ece"],
        "ece": calibrated["ece"],
        "ece_by_chance": calibration_error_by_chance(pairs.log_odds),
        "calibrated/nll": calibrated["nll"],
        "calibrated/brier": calibrated["brier"],
        "mean_abs_margin": float(np.abs(margins).mean()),
    }
    confidences["log_odds"] = np.abs(pairs.log_odds)
    if pairs.margin_std.any():
        confidences["std"] = -pairs.margin_std
    if answer_threshold is not None:
        answered = np.abs(pairs.log_odds) > answer_threshold
        metrics["answered"] = float(answered.mean())
        metrics["answered_error"] = float((margins[answered] <= 0).mean()) if answered.any() else float("nan")
    areas = {name: risk_coverage_area(errors, confidence) for name, confidence in confidences.items()}
    metrics |= {f"aurc/{name}": area for name, area in areas.items()}
    metrics |= {f"aurc_gain/{name}": float(errors.mean()) - area for name, area in areas.items()}
    longer, shorter = pairs.length_gap > 0, pairs.length_gap < 0
    return metrics | {
        "prefers_longer": prefers_longer(margins, pairs.length_gap),
        "length_correlation": length_correlation(margins, pairs.length_gap),
        "accuracy/chosen_longer": float(correct[longer].mean()) if longer.any() else float("nan"),
        "accuracy/chosen_shorter": float(correct[shorter].mean()) if shorter.any() else float("nan"),
    }


# ----------------------------------------------------------------------------- probabilities


def calibration(logits: np.ndarray) -> Metrics:
    """`nll` (nats), `brier` and `ece` of P(chosen is better) = sigmoid(logit); the outcome is always 1.

    nll = mean log(1 + exp(-logit)),   brier = mean (1 - sigmoid(logit))^2   (Brier 1950)

    Args:
        logits: [B].
    """
    return {
        "nll": float(np.logaddexp(0.0, -logits).mean()),
        "brier": float(((1.0 - _sigmoid(logits)) ** 2).mean()),
        "ece": calibration_error(logits),
    }


def calibration_error(margins: np.ndarray) -> float:
    """Expected calibration error of the Bradley-Terry confidence.

    ECE = sum_bins n_bin / n * |accuracy_bin - confidence_bin|,  confidence = sigmoid(|margin|), bins of equal mass

    Source: Guo et al. 2017, arXiv:1706.04599, Eq. 3, with equal-mass bins (docs/method.md section 10). A tie is 1/2.
    Rows of equal confidence count with their mean accuracy, so the order of the rows does not matter.

    Args:
        margins: [B] r_chosen - r_rejected.
    """
    confident, group, size = np.unique(np.abs(margins), return_inverse=True, return_counts=True)
    gap_of_group = np.bincount(group, _correct(margins)) / size - _sigmoid(confident)
    gaps = np.repeat(gap_of_group, size)
    return float(sum(abs(bin_gaps.sum()) for bin_gaps in np.array_split(gaps, CALIBRATION_BINS))) / len(margins)


def calibration_error_by_chance(logits: np.ndarray) -> float:
    """The expected calibration error that B pairs show by chance where every probability is right.

    sum_bins n_bin / B E|gap_bin| = sum_bins 1 / B sqrt(2 / pi sum_{i in bin} p_i (1 - p_i)),   p = sigmoid(|logit|)

    In each bin the sum of the gaps is nearly normal around 0. By the triangle inequality the expected
    `calibration_error` is at most the true error plus this. So the measured one minus this is a cautious estimate of
    the true error.

    Args:
        logits: [B].
    """
    p = _sigmoid(np.sort(np.abs(logits)))
    variances = [bin_variances.sum() for bin_variances in np.array_split(p * (1.0 - p), CALIBRATION_BINS)]
    return float(np.sqrt(2.0 / np.pi * np.array(variances)).sum()) / len(logits)


def risk_coverage_area(errors: np.ndarray, confidence: np.ndarray) -> float:
    """Area under the risk-coverage curve: the mean error over all ways to keep only the most confident rows.

    AURC = 1/n sum_{k=1..n} (1/k sum of the errors of the k most confident rows)

    Source: Geifman, Uziel & El-Yaniv 2019, arXiv:1805.08206. Rows of equal confidence count with
    their mean error, so the order of the rows does not matter. With constant confidence, the area is the error rate.

    Args:
        errors: [B] in [0, 1].
        confidence: [B], larger means more confident. Only the order matters.
    """
    _, group, size = np.unique(-confidence, return_inverse=True, return_counts=True)
    error_at_rank = np.repeat(np.bincount(group, errors) / size, size)
    return float((error_at_rank.cumsum() / np.arange(1, len(errors) + 1)).mean())


# ----------------------------------------------------------------------------- length


def prefers_longer(margins: np.ndarray, length_gap: np.ndarray) -> float:
    """Share of pairs of unequal length whose longer response has the higher reward; ties are 1/2. 0.5 without pairs."""
    unequal = length_gap != 0
    agreement = np.sign(margins[unequal]) * np.sign(length_gap[unequal])
    return float((0.5 * (1.0 + agreement)).mean()) if unequal.any() else 0.5


def longer_is_better(length_gaps: Sequence[int]) -> float:
    """Accuracy of the rule that prefers the longer response. Equal lengths count one half.

    Args:
        length_gaps: [B] length of the chosen response minus length of the rejected one.
    """
    return accuracy_metrics(np.asarray(length_gaps))["accuracy_tie_half"]


def length_correlation(margins: np.ndarray, length_gap: np.ndarray) -> float:
    """Spearman correlation of margin and length gap over both orientations of every pair; 0 without variation.

    Each (margin, gap) is accompanied by (-margin, -gap), so the number does not depend on which response is the chosen
    one. A model that rewards only length has 1; a model that ignores length has 0.
    """
    x, y = _symmetric_ranks(margins), _symmetric_ranks(length_gap)
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norm if norm else 0.0


def length_slope(margins: np.ndarray, length_gap: np.ndarray) -> float:
    """Reward per unit of length: the least-squares slope of the margin on the length gap.

    slope = sum_b margin_b * gap_b / sum_b gap_b^2,  through the origin, so that the orientation of a pair does not
    matter; 0 without length gaps.
    """
    square = float(length_gap @ length_gap)
    return float(margins @ length_gap) / square if square else 0.0


def _symmetric_ranks(values: np.ndarray) -> np.ndarray:
    """Rank of every v_i among all v and all -v, minus the mean rank. Equal values share their mean rank.

    sign(v_i) * ( #{j: |v_j| < |v_i|} + 1/2 #{j: |v_j| = |v_i|} ),  since as many lie above v_i as below -v_i
    """
    _, group, size = np.unique(np.abs(values), return_inverse=True, return_counts=True)
    return np.sign(values) * (size.cumsum() - 0.5 * size)[group]


def _correct(margins: np.ndarray) -> np.ndarray:
    """[B] 1 for a right order, 0 for a wrong one, 0.5 for a tie."""
    return 0.5 * (1.0 + np.sign(margins))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))
