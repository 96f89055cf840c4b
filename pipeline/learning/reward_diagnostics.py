"""What accuracy alone cannot see in a reward model: collapse, miscalibration, a taste for length."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.benchmark.pairwise import calibration_error, prefers_longer
from pipeline.models.reward_heads import RewardOutput
from pipeline.records import Metrics, PreferenceBatch

ACTIVE_VARIANCE = 0.01
"""A semantic dimension whose mean varies by more than this over (x, y) is active (vrm_spec section 12)."""


def reward_diagnostics(output: RewardOutput, batch: PreferenceBatch) -> Metrics:
    """The signals of vrm_spec section 12 on a whole held-out batch.

    Args:
        output: 2B rows, float64, chosen first; a field that a head does not know is 0 wide.
        batch: the same rows.

    Returns:
        The scale of the reward, its calibration and its taste for length; for a VRM or gate head also active units, and
        spread and supervision of the objective weights; with a posterior their concentration. Means are over the batch.
    """
    num_pairs = batch.num_pairs
    margins = (output.mean[:num_pairs] - output.mean[num_pairs:]).cpu().numpy()
    length_gaps = np.array([len(chosen) - len(rejected) for chosen, rejected in (p.response_ids for p in batch.pairs)])
    metrics = {
        "eval/reward_mean": float(output.mean.mean()),
        "eval/reward_std": float(output.mean.std(correction=0)),
        "eval/posterior_std": float(output.variance.sqrt().mean()),
        "eval/calibration_error": calibration_error(margins),
        "eval/prefers_longer": prefers_longer(margins, length_gaps),
    }
    if output.alpha.shape[1]:
        alpha = output.alpha[:num_pairs]  # the chosen row speaks for the prompt
        metrics |= {
            "eval/concentration": float(alpha.sum(-1).mean()),
            "eval/concentration_p95": float(alpha.sum(-1).quantile(0.95)),
            "eval/min_alpha": float(alpha.min()),
        }
    if output.mu.shape[1]:
        # Divided here in float64: correlations of weights that hardly vary magnify rounding.
        weights = (output.alpha if output.alpha.shape[1] else output.weights)[:num_pairs]
        w_bar = weights / weights.sum(-1, keepdim=True)
        metrics |= {
            "eval/active_units": float((output.mu.var(0, correction=0) > ACTIVE_VARIANCE).sum()),
            "eval/weight_variance": float(w_bar.var(0, correction=0).mean()),
            "eval/weight_entropy": float(_entropy(w_bar).mean()),
        }
        supervised = batch.target_mask.any(-1)
        if supervised.any():
            metrics["eval/target_entropy"] = float(_entropy(batch.target[supervised].double()).mean())
            metrics["eval/target_correlation"] = target_correlation(w_bar, batch.target, batch.target_mask)
    return metrics


def target_correlation(w_bar: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> float:
    """Pearson correlation over prompts of inferred and target weight, averaged over objectives.

    A prompt counts for the objectives annotated on it, with its weights renormalised over them, as in the loss.
    An objective whose weight or target does not vary has correlation 0.

    Args:
        w_bar, target, mask: [B, K].
    """
    present = torch.where(mask, w_bar, torch.zeros_like(w_bar))
    present = present / present.sum(-1, keepdim=True).clamp(min=1e-12)
    correlations = [_pearson(present[rows, k], target[rows, k].double()) for k, rows in enumerate(mask.unbind(-1))]
    return sum(correlations) / len(correlations)


def _pearson(x: torch.Tensor, y: torch.Tensor) -> float:
    if len(x) < 2:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    norm = float(x.norm() * y.norm())
    return float((x * y).sum()) / norm if norm > 1e-12 else 0.0


def _entropy(p: torch.Tensor) -> torch.Tensor:
    """[B, K] -> [B] nats."""
    return -torch.xlogy(p, p).sum(-1)
