"""The Bradley-Terry likelihood of a comparison."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from pipeline.objectives.masked import require_same_shape


def bradley_terry_loss(margins: torch.Tensor, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Negative log-likelihood that the chosen response wins.

    L_b = -(1 - eps) log sigmoid(r_w - r_l) - eps log sigmoid(r_l - r_w)

    Source: VRM, arXiv 2603.04974, Eqs. 1 and 12, where eps = 0; eps is the share of labels taken to be wrong
    (Mitchell 2023, "A note on DPO with noisy preferences").

    Args:
        margins: [B] reward of the chosen minus reward of the rejected response, float32.
        label_smoothing: eps in [0, 1/2).

    Returns:
        [B] losses in nats; ln 2 when the model says nothing.
    """
    return -(1.0 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def margin_loss(margins: torch.Tensor, annotated: torch.Tensor, *, scale: float) -> torch.Tensor:
    """L_b = -log sigmoid(r_w - r_l - c m_b): a clearer preference has to be won by more.

    Source: Touvron et al. 2023, arXiv:2307.09288, Eq. 2.

    Args:
        margins: [B] reward of the chosen minus reward of the rejected response.
        annotated: [B] m >= 0, how much better the chosen response was rated; NaN, which counts as 0, where unknown.
        scale: c > 0, units of reward per unit of rating.

    Returns:
        [B] nats.
    """
    require_same_shape(margins=margins, annotated=annotated)
    return -F.logsigmoid(margins - scale * torch.nan_to_num(annotated, nan=0.0))


def scaled_loss(margins: torch.Tensor, annotated: torch.Tensor, *, scale: float) -> torch.Tensor:
    """L_b = -c m_b log sigmoid(r_w - r_l): a pair counts as often as its preference is clear.

    Source: "Scaled Bradley-Terry" of Wang et al. 2024, arXiv:2410.01257. Args and result as in `margin_loss`;
    a pair of unknown margin has weight 1.
    """
    require_same_shape(margins=margins, annotated=annotated)
    return -torch.nan_to_num(scale * annotated, nan=1.0) * F.logsigmoid(margins)


def tie_loss(margins: torch.Tensor, annotated: torch.Tensor, *, threshold: float) -> torch.Tensor:
    """Negative log-likelihood of a win or a tie, whichever was annotated.

    P(win) = sigmoid(D - eta),   P(tie) = (e^{2 eta} - 1) sigmoid(D - eta) sigmoid(-D - eta),   D = r_w - r_l

    The three outcomes add up to 1, and within about +-eta a tie is likely.

    Source: Rao & Kupper 1967, "Ties in paired-comparison experiments", with theta = e^eta.

    Args:
        margins: [B] D.
        annotated: [B] 0 for a tie; any other value, and NaN, for a win.
        threshold: eta > 0.

    Returns:
        [B] nats.
    """
    require_same_shape(margins=margins, annotated=annotated)
    win = -F.logsigmoid(margins - threshold)
    tie = win - F.logsigmoid(-margins - threshold) - math.log(math.expm1(2.0 * threshold))
    return torch.where(annotated == 0, tie, win)


def score_error(scores: torch.Tensor, annotated: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """L_n = sum_{k in mask} (s_k - s_hat_k)^2: objective scores regressed on their annotations.

    Source: the regression reward model of HelpSteer2, Wang et al. 2024, arXiv:2406.08673, on standardised scores.

    Args:
        scores: [N, K] predicted.
        annotated: [N, K] standardised annotations; ignored where masked.
        mask: [N, K] bool.

    Returns:
        [N], dimensionless; 0 for rows without annotation.
    """
    require_same_shape(scores=scores, annotated=annotated, mask=mask)
    return torch.where(mask, (scores - annotated) ** 2, torch.zeros_like(scores)).sum(-1)


def ranked_correctly(margins: torch.Tensor) -> torch.Tensor:
    """[B] 1 where the chosen response scores strictly higher; a tie is an error (RewardBench's rule)."""
    return (margins > 0).to(torch.float32)
