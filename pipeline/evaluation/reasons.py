"""Whether objective scores mean what they are named after, on annotations that training did not see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pipeline.evaluation.correlation import correlation_or_zero
from pipeline.objectives.masked import require_same_shape
from pipeline.records import Metrics

REASON_PREFIX = "reasons/"

TRUSTED_PAIR_ACCURACY = 0.65
"""A score that orders fewer of the annotator's held-out pairs than this is not shown as a reason. Chance is 0.5."""

LEAST_PAIRS = 30
"""Fewer annotated held-out pairs verify nothing: chance alone moves a share of 30 by 0.09."""


def reason_fidelity(
    scores: torch.Tensor, annotations: torch.Tensor, mask: torch.Tensor, objectives: Sequence[str]
) -> Metrics:
    """How well the scores of each objective agree with its annotations on held-out pairs.

    correlation_k    = Pearson correlation of s_k and its annotation over annotated responses
    pair_accuracy_k  = share of pairs that s_k orders as the annotator does, among pairs that the annotator orders;
                       equal scores count one half
    collinearity     = mean |correlation| of two objectives' scores: at 1 all objectives are one score

    Args:
        scores: [2B, K] objective scores, chosen rows first.
        annotations: [2B, K] annotated scores in any unit, ignored where masked.
        mask: [2B, K] bool, True where annotated.
        objectives: K names.

    Returns:
        `reasons/<objective>/{correlation,pair_accuracy,pairs}` for each objective with an ordered pair, and
        `reasons/collinearity`. Nothing is returned for a head without scores.
    """
    require_same_shape(annotations=annotations, mask=mask)
    if not scores.shape[1]:
        return {}
    require_same_shape(scores=scores, annotations=annotations)
    num_pairs = len(scores) // 2
    metrics = {f"{REASON_PREFIX}collinearity": score_collinearity(scores)}
    for k, objective in enumerate(objectives):
        s, t, known = scores[:, k].double(), annotations[:, k].double(), mask[:, k]
        truth = torch.sign(t[:num_pairs] - t[num_pairs:])
        ordered = known[:num_pairs] & known[num_pairs:] & (truth != 0)
        if not ordered.any():
            continue
        agreement = torch.sign(s[:num_pairs] - s[num_pairs:])[ordered] * truth[ordered]
        metrics |= {
            f"{REASON_PREFIX}{objective}/correlation": correlation_or_zero(
                s[known].cpu().numpy(), t[known].cpu().numpy()
            ),
            f"{REASON_PREFIX}{objective}/pair_accuracy": float(0.5 + 0.5 * agreement.mean()),
            f"{REASON_PREFIX}{objective}/pairs": float(ordered.sum()),
        }
    return metrics


def verified_objectives(metrics: Mapping[str, float], objectives: Sequence[str]) -> tuple[str, ...]:
    """The objectives whose scores may be shown as reasons: enough held-out pairs, and enough of them ordered right."""
    return tuple(
        objective
        for objective in objectives
        if metrics.get(f"{REASON_PREFIX}{objective}/pairs", 0.0) >= LEAST_PAIRS
        and metrics.get(f"{REASON_PREFIX}{objective}/pair_accuracy", 0.0) >= TRUSTED_PAIR_ACCURACY
    )


def score_collinearity(scores: torch.Tensor) -> float:
    """Mean absolute correlation over responses of two different objectives' scores: 1 when all say the same.

    Equals 1 when the rows of S are collinear, and does not need S, which ZeRO-3 keeps in pieces.

    Args:
        scores: [N, K], K >= 2.
    """
    columns = scores.unbind(-1)
    pairs = [(x, y) for k, x in enumerate(columns) for y in columns[:k]]
    return sum(abs(correlation_or_zero(x.cpu().numpy(), y.cpu().numpy())) for x, y in pairs) / len(pairs)
