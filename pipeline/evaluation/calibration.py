"""Calibration of margins on held-out pairs: temperature, variance factor, and when to answer at all.

docs/method.md section 10. All functions take margins r_chosen - r_rejected, so the right answer is a positive margin.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from pipeline.objectives.pac_bayes import clopper_pearson_upper
from pipeline.records import PromptGroup

LEAST_PAIRS = 30
"""Fewer held-out pairs calibrate nothing: temperature and variance factor stay 1, and no comparison is confident."""

PRIOR_STD = 2.0
"""Standard deviation of a normal prior on ln T and on ln sqrt(f v), v the median variance. Without it the parameters
of 30 pairs that happen to be ordered right are without bound, and so is the certainty of the model."""

COVERAGES = 10
"""Thresholds that are tried: the most confident tenth of the pairs, two tenths, and so on."""


class HeldoutSplit(NamedTuple):
    """Rows of held-out pairs; no prompt is in two parts."""

    scale: np.ndarray
    """A quarter: temperature and variance factor are fitted to it."""
    threshold: np.ndarray
    """A quarter: the threshold of an answer is chosen on it."""
    report: np.ndarray
    """Half: what is reported of the calibrated model."""


def split_heldout(pairs: Sequence[PromptGroup]) -> HeldoutSplit:
    """The parts of held-out pairs, by a hash of the prompt's tokens."""
    draws = np.array(
        [hashlib.sha256(np.asarray(pair.prompt_ids, dtype=np.int64).tobytes()).digest()[0] for pair in pairs]
    )
    return HeldoutSplit(
        scale=np.flatnonzero(draws < 64),
        threshold=np.flatnonzero((draws >= 64) & (draws < 128)),
        report=np.flatnonzero(draws >= 128),
    )


class Scale(NamedTuple):
    """What turns a margin and its variance into log-odds."""

    temperature: float
    variance_factor: float


def log_odds(margins: np.ndarray, variances: np.ndarray, temperature: float) -> np.ndarray:
    """[B] logits of P(chosen is better): l = m / sqrt(T^2 + pi/8 v).

    With T = 1 it is MacKay's approximation of E[sigmoid(N(m, v))]; with v = 0 it is temperature scaling.

    Source: MacKay 1992 and Guo et al. 2017, arXiv:1706.04599, section 4.2; the combination is ours.

    Args:
        margins, variances: [B].
    """
    return margins / np.sqrt(temperature**2 + np.pi / 8.0 * variances)


def fit_scale(margins: np.ndarray, variances: np.ndarray) -> Scale:
    """T and the factor f of the variances of largest posterior density, for the log-odds m / sqrt(T^2 + pi/8 f v).

    The prior of both logarithms is normal (`PRIOR_STD`). Its centre is T = 1, and the factor that makes the median
    standard deviation 1. Without variances the factor is 1.

    Args:
        margins, variances: [B] of pairs that no parameter has seen.
    """
    has_variance = bool((variances > 0).any())
    m = torch.from_numpy(np.asarray(margins, dtype=np.float64))
    shrinkage = 1.0 / (2.0 * PRIOR_STD**2 * len(margins))
    unit = 1.0 / float(np.median(variances[variances > 0])) if has_variance else 1.0
    v = unit * torch.from_numpy(np.asarray(variances, dtype=np.float64))
    best: tuple[float, Scale] | None = None
    for start in (-1.5, 0.0, 1.5) if has_variance else (0.0,):
        logs = torch.tensor([0.0, start], dtype=torch.float64, requires_grad=True)
        # To the bottom: along a direction that the pairs leave flat, an early end depends on rounding.
        optimiser = torch.optim.LBFGS(
            [logs], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
        )

        def objective(logs: torch.Tensor = logs, optimiser: torch.optim.LBFGS = optimiser) -> torch.Tensor:
            optimiser.zero_grad()
            squares = torch.exp(2.0 * logs)
            logits = m / torch.sqrt(squares[0] + torch.pi / 8.0 * squares[1] * v)
            loss = torch.nn.functional.softplus(-logits).mean() + shrinkage * logs.square().sum()
            loss.backward()
            return loss

        optimiser.step(objective)
        loss = float(objective().detach())
        if best is None or loss < best[0]:
            temperature, deviation = torch.exp(logs.detach()).tolist()
            best = loss, Scale(temperature, unit * deviation**2 if has_variance else 1.0)
    assert best is not None  # there is a start
    return best[1]


def answer_threshold(logits: np.ndarray, *, error: float, delta: float) -> float | None:
    """The lowest |log-odds| from which an answer may be given, or None where none is safe.

    With probability 1 - delta over the pairs given here, at most a share `error` of all answers is wrong:
    P( wrong | |l| > threshold ) <= error. The pairs and those to come must be exchangeable. So no guarantee holds for
    prompts of another kind.

    The pairs are sorted by confidence. For each tenth j, the errors among the j most confident pairs are binomial,
    given the confidence of the next pair. The threshold is that of the largest j whose Clopper-Pearson bound, at level
    delta / 10, is at most `error`. The union over the ten tests gives the probability.

    Source: Geifman & El-Yaniv 2017, arXiv:1705.08500, with fixed coverages in place of their search; it is Learn then
    Test (Angelopoulos et al. 2021, arXiv:2110.01052) with Bonferroni's correction.

    Args:
        logits: [n] log-odds of pairs that nothing else was fitted to; a tie counts as wrong.
    """
    n = len(logits)
    confidence = np.sort(np.abs(logits))[::-1]
    for tenth in range(COVERAGES, 0, -1):
        count = n * tenth // COVERAGES
        if not count:
            break
        # Pairs as confident as the next one are not among the answered ones.
        threshold = float(confidence[count]) if count < n else 0.0
        answered = np.abs(logits) > threshold
        wrong, given = int((logits[answered] <= 0).sum()), int(answered.sum())
        if given and clopper_pearson_upper(wrong, given, delta / COVERAGES) <= error:
            return threshold
    return None
