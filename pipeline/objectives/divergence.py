"""Estimators of KL(policy || reference) from sampled tokens, and the controller of their weight."""

from __future__ import annotations

from typing import Literal

import torch

from pipeline.objectives.masked import require_same_shape


def kl_estimate(
    logprobs: torch.Tensor, reference_logprobs: torch.Tensor, estimator: Literal["k1", "k2", "k3"]
) -> torch.Tensor:
    """Per-token estimate of KL(pi || pi_ref) from tokens sampled by pi.

    With k = log pi - log pi_ref:  k1 = k;  k2 = k^2 / 2;  k3 = exp(-k) - 1 + k.
    k1 and k3 are unbiased, k2 is biased with low variance; k2 and k3 are never negative.

    Source: Schulman 2020, "Approximating KL divergence"; docs/method.md section 11.

    Args:
        logprobs: [B, T] under the policy, nats.
        reference_logprobs: [B, T] under the reference policy, nats.
        estimator: which of the three.

    Returns:
        [B, T] estimates in nats.
    """
    require_same_shape(logprobs=logprobs, reference_logprobs=reference_logprobs)
    k = logprobs - reference_logprobs
    match estimator:
        case "k1":
            return k
        case "k2":
            return 0.5 * k**2
        case "k3":
            return torch.exp(-k) - 1.0 + k


def adapt_kl_coefficient(coefficient: float, *, kl: float, target: float, horizon: float, num_responses: int) -> float:
    """One step of the proportional controller that keeps the KL per response near a target.

    e = clip(KL / target - 1, -0.2, 0.2);  beta <- beta * (1 + e * n / horizon)

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2 (their batch size is our n).

    Args:
        coefficient: beta > 0.
        kl: measured mean KL per response, nats.
        target: KL per response to aim at, nats.
        horizon: responses over which the controller reacts.
        num_responses: responses in this step.

    Returns:
        The next beta.
    """
    error = max(-0.2, min(0.2, kl / target - 1.0))
    return coefficient * (1.0 + error * num_responses / horizon)
