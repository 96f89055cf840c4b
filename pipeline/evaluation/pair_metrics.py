"""A reward model on preference pairs: is it right, does it know when it is not, does it pay for length?

Everything here is a function of the margins r_chosen - r_rejected of B pairs and of what stands beside them, as
float64 arrays. Training diagnostics and evaluation share it.
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
    """Posterior standard deviation of their difference (`objectives.comparison`); 0 for a head without a posterior."""
    length_gap: np.ndarray
    """Length of the chosen minus length of the rejected response, in any unit."""

    def __post_init__(self) -> None:
        shapes = {name: column.shape for name, column in vars(self).items()}
        if len(set(shapes.values())) != 1 or self.chosen.ndim != 1 or not len(self.chosen):
            raise ShapeError(f"columns of scored pairs must have one length, at least 1; they are {shapes}")

    def take(self, rows: np.ndarray) -> ScoredPairs:
        return ScoredPairs(**{name: column[rows] for name, column in vars(self).items()})


def accuracy_metrics(margins: np.ndarray) -> Metrics:
    """Share of pairs whose chosen response gets the higher reward.

    Returns:
        `accuracy` counts a tie as wrong, as RewardBench does; `accuracy_tie_half` counts it one half; `ties` is the
        share of ties, usually the mark of a reward rounded to bfloat16 (docs/method.md section 10).
    """
    ties = float((margins == 0).mean())
    accuracy = float((margins > 0).mean())
    return {"accuracy": accuracy, "accuracy_tie_half": accuracy + 0.5 * ties, "ties": ties}


def pair_diagnostics(pairs: ScoredPairs) -> Metrics:
    """What accuracy alone cannot see.

    The `probit/` metrics and the `aurc/` of the standard deviation are there when any pair has one.

    Returns:
        `nll`, `brier`, `calibration_error` of p = sigmoid(margin), and `probit/...` the same of the probability that
        knows its uncertainty (`probit_margins`); `mean_abs_margin`;
        `aurc/...` (`risk_coverage_area`) with |margin|, the standard deviation and their ratio as confidence, and
        `aurc_gain/...`, how far that is below the error rate: 0 is a confidence that knows nothing of the errors;
        `prefers_longer`, `length_correlation`, and the accuracy, ties one half, where the chosen response is the
        longer or the shorter one (NaN where there is no such pair).
    """
    margins = pairs.chosen - pairs.rejected
    correct = _correct(margins)
    errors = 1.0 - correct
    confidences = {"margin": np.abs(margins)}
    metrics = calibration(margins) | {"mean_abs_margin": float(np.abs(margins).mean())}
    variance = pairs.margin_std**2
    if variance.any():
        probit = calibration(probit_margins(margins, variance))
        metrics |= {f"probit/{name}": value for name, value in probit.items()}
        # A margin without uncertainty is the most confident of its size; the floor only keeps 0 / 0 out.
        std = np.sqrt(np.maximum(variance, np.finfo(np.float64).tiny))
        confidences |= {"std": -std, "margin_over_std": np.abs(margins) / std}
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
    """`nll` (nats), `brier` and `calibration_error` of P(chosen is better) = sigmoid(logit); the outcome is always 1.

    nll = mean log(1 + exp(-logit)),   brier = mean (1 - sigmoid(logit))^2   (Brier 1950)

    Args:
        logits: [B].
    """
    return {
        "nll": float(np.logaddexp(0.0, -logits).mean()),
        "brier": float(((1.0 - _sigmoid(logits)) ** 2).mean()),
        "calibration_error": calibration_error(logits),
    }


def calibration_error(margins: np.ndarray) -> float:
    """Expected calibration error of the Bradley-Terry confidence.

    ECE = sum_bins n_bin / n * |accuracy_bin - confidence_bin|,  confidence = sigmoid(|margin|), bins of equal mass

    Source: Guo et al. 2017, arXiv:1706.04599, Eq. 3, equal-mass bins (docs/method.md section 10). A tie counts 1/2.

    Args:
        margins: [B] r_chosen - r_rejected.
    """
    order = np.abs(margins).argsort(kind="stable")
    gaps = (_correct(margins) - _sigmoid(np.abs(margins)))[order]
    return float(sum(abs(bin_gaps.sum()) for bin_gaps in np.array_split(gaps, CALIBRATION_BINS))) / len(margins)


def probit_margins(margins: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Logits of the mean of sigmoid(N(margin, variance)), in MacKay's approximation.

    E[sigmoid(m)] ~ sigmoid( m / sqrt(1 + pi/8 variance) )

    Source: MacKay 1992, "The evidence framework applied to classification networks" (docs/method.md section 7).

    Args:
        margins, variance: [B].
    """
    return margins / np.sqrt(1.0 + np.pi / 8.0 * variance)


def risk_coverage_area(errors: np.ndarray, confidence: np.ndarray) -> float:
    """Area under the risk-coverage curve: the mean error over all ways to keep only the most confident rows.

    AURC = 1/n sum_{k=1..n} (1/k sum of the errors of the k most confident rows)

    Source: Geifman, Uziel & El-Yaniv 2019, arXiv:1805.08206. Rows of equal confidence count with
    their mean error, so their order in the file does not matter; with constant confidence the area is the error rate.

    Args:
        errors: [B] in [0, 1].
        confidence: [B], larger is surer; only its order matters.
    """
    _, group, size = np.unique(-confidence, return_inverse=True, return_counts=True)
    error_at_rank = np.repeat(np.bincount(group, errors) / size, size)
    return float((error_at_rank.cumsum() / np.arange(1, len(errors) + 1)).mean())


# ----------------------------------------------------------------------------- length


def prefers_longer(margins: np.ndarray, length_gap: np.ndarray) -> float:
    """Share of pairs of unequal length whose longer response gets the higher reward, ties one half; 0.5 if none."""
    unequal = length_gap != 0
    agreement = np.sign(margins[unequal]) * np.sign(length_gap[unequal])
    return float((0.5 * (1.0 + agreement)).mean()) if unequal.any() else 0.5


def longer_is_better(length_gaps: Sequence[int]) -> float:
    """Accuracy of the rule that prefers the longer response; equal lengths count one half.

    Args:
        length_gaps: [B] length of the chosen minus length of the rejected response.
    """
    return accuracy_metrics(np.asarray(length_gaps))["accuracy_tie_half"]


def length_correlation(margins: np.ndarray, length_gap: np.ndarray) -> float:
    """Spearman correlation of margin and length difference over both orientations of every pair; 0 without variation.

    With (margin, gap) stands (-margin, -gap), so the number does not depend on which response was called the chosen
    one: a model that pays for length alone has 1, one that ignores it 0.
    """
    x, y = _symmetric_ranks(margins), _symmetric_ranks(length_gap)
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norm if norm else 0.0


def length_slope(margins: np.ndarray, length_gap: np.ndarray) -> float:
    """Reward that a unit of length is worth: the least-squares slope of the margin on the length difference.

    slope = sum_b margin_b * gap_b / sum_b gap_b^2,  through the origin, so that the orientation of a pair does not
    matter; 0 without differences.
    """
    square = float(length_gap @ length_gap)
    return float(margins @ length_gap) / square if square else 0.0


def _symmetric_ranks(values: np.ndarray) -> np.ndarray:
    """Rank of every v_i among all v and all -v, minus the mean rank; equal values share the mean of their ranks.

    sign(v_i) * ( #{j: |v_j| < |v_i|} + 1/2 #{j: |v_j| = |v_i|} ),  since as many lie above v_i as below -v_i
    """
    _, group, size = np.unique(np.abs(values), return_inverse=True, return_counts=True)
    return np.sign(values) * (size.cumsum() - 0.5 * size)[group]


def _correct(margins: np.ndarray) -> np.ndarray:
    """[B] 1 right, 0 wrong, 0.5 tie."""
    return 0.5 * (1.0 + np.sign(margins))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))
