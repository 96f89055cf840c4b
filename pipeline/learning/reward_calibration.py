"""The error bar and the calibration of a finished reward model (docs/method.md section 7)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from pipeline.evaluation.calibration import LEAST_PAIRS, Scale, answer_threshold, fit_scale, log_odds, split_heldout
from pipeline.models.last_layer import LastLayerEvidence, LastLayerPosterior, pair_differences
from pipeline.models.reward_heads import EnsembleHead, RewardHead, RewardOutput, member_spread
from pipeline.models.reward_model_card import RewardCalibration
from pipeline.records import PromptGroup

PRIOR_PRECISION = 0.01
"""Prior precision in units of the mean eigenvalue of the data's. No weight decay acts on these maps, so the prior of
the training is flat; this one only bounds what no pair has fixed. Held-out pairs cannot choose it: in the directions
of the training pairs it hardly counts, and pairs in other directions are what they lack (docs/method.md section 7)."""


def calibrate_head(
    head: RewardHead,
    training: Iterable[RewardOutput],
    heldout: RewardOutput,
    pairs: Sequence[PromptGroup],
    *,
    error: float,
    delta: float,
) -> tuple[RewardCalibration, torch.Tensor]:
    """Fills the head's last-layer posterior, and fits temperature, variance factor and answer threshold.

    The Laplace posterior comes from training pairs. The factor of its variances and the temperature are fitted to one
    quarter of the held-out pairs. The threshold comes from another quarter.

    Args:
        training: outputs of training batches, 2B rows each, in eval mode, on the CPU.
        heldout: the output of the held-out batch, [2B] rows.
        pairs: its B pairs.
        error, delta: as in `answer_threshold`.

    Returns:
        The calibration, and the [2B, L] deviations of the held-out rewards under it.
    """
    split = split_heldout(pairs)
    margins = pair_differences(heldout.mean.double()).numpy()
    precision = 0.0
    if isinstance(head, EnsembleHead):
        head.last_layer.draws.copy_(member_spread(head.last_layer.draws.shape[0]))
    else:
        evidence = LastLayerEvidence.of((output.last_layer_inputs, output.mean) for output in training)
        # Without a factor that fits held-out pairs a weak prior would be all that the error bar shows.
        share = PRIOR_PRECISION if len(split.scale) >= LEAST_PAIRS else 1.0
        precision = share * max(float(evidence.precision.values.mean()), 1e-12)
        head.last_layer.fill(evidence.reference, evidence.draws(heldout.last_layer_inputs, precision))
    variances = _margin_variances(_deviations(head.last_layer, heldout))
    scale = _scale(margins[split.scale], variances[split.scale])
    head.last_layer.draws.mul_(scale.variance_factor**0.5)
    deviations = _deviations(head.last_layer, heldout)
    logits = log_odds(margins, _margin_variances(deviations), scale.temperature)
    threshold = None
    if len(split.threshold) >= LEAST_PAIRS:
        threshold = answer_threshold(logits[split.threshold], error=error, delta=delta)
    calibration = RewardCalibration(
        temperature=scale.temperature,
        variance_factor=scale.variance_factor,
        prior_precision=precision,
        posterior_std=float(deviations.double().norm(dim=-1).mean()),
        answer_threshold=threshold,
        answer_error=error,
        answer_delta=delta,
    )
    return calibration, deviations


def _scale(margins: np.ndarray, variances: np.ndarray) -> Scale:
    if len(margins) < LEAST_PAIRS:
        return Scale(temperature=1.0, variance_factor=1.0)
    return fit_scale(margins, variances)


def _deviations(last_layer: LastLayerPosterior, output: RewardOutput) -> torch.Tensor:
    """[2B, L], on the CPU."""
    device = last_layer.draws.device
    inputs = output.last_layer_inputs
    with torch.no_grad():
        return last_layer(type(inputs)(*(field.to(device) for field in inputs))).deviations.cpu()


def _margin_variances(deviations: torch.Tensor) -> np.ndarray:
    """[B] float64."""
    return pair_differences(deviations.double()).square().sum(-1).numpy()
