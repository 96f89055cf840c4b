"""Held-out diagnostics of a reward model: collapse, miscalibration and preference for length."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from pipeline.evaluation.bootstrap import bootstrap_intervals
from pipeline.evaluation.calibration import log_odds, split_heldout
from pipeline.evaluation.correlation import correlation_or_zero
from pipeline.evaluation.pair_metrics import ScoredPairs, length_slope, pair_diagnostics
from pipeline.evaluation.reasons import (
    SummedRewards,
    agreement_with_truth,
    mean_margin_contributions,
    reason_fidelity,
    verified_objectives,
)
from pipeline.evaluation.source_metrics import source_metrics
from pipeline.evaluation.win_rate import wilson_interval
from pipeline.models.reward_heads import RewardOutput
from pipeline.models.reward_model_card import RewardCalibration
from pipeline.objectives.preference import bradley_terry_loss, ranked_correctly
from pipeline.objectives.variational import gaussian_kl_per_dimension
from pipeline.records import Metrics, PreferenceBatch

PAIR_METRICS = (
    "brier",
    "prefers_longer",
    "length_correlation",
    "accuracy/chosen_longer",
    "accuracy/chosen_shorter",
)
"""The metrics of `pair_diagnostics` that every evaluation logs (docs/method.md section 10)."""

REPORTED_METRICS = (
    "ece",
    "ece_by_chance",
    "ece_uncalibrated",
    "calibrated/nll",
    "calibrated/brier",
    "aurc_gain/margin",
    "aurc_gain/log_odds",
    "aurc_gain/std",
    "answered",
    "answered_error",
)
"""Those of a calibrated model, on held-out pairs that had no part in its calibration."""

MARGIN_QUANTILES = (5, 50, 95)
"""Quantiles of r_chosen - r_rejected, in percent."""

ENDS = ("low", "high")

ACTIVE_VARIANCE = 0.01
"""A semantic dimension whose mean varies by more than this over (x, y) is active (docs/method.md section 10)."""


def mismatched_accuracy(margins: torch.Tensor) -> Metrics:
    """Share of chosen responses that beat one that was chosen for another prompt, and its 95% Wilson interval.

    A reward that does not read the prompt has 1/2 in expectation: either response was chosen for some prompt.

    Args:
        margins: [B] reward of the response to the prompt minus that of the response to another, with this prompt.
    """
    share = float(ranked_correctly(margins).mean())
    low, high = wilson_interval(share, len(margins))
    return {
        "eval/mismatched_accuracy": share,
        "eval/mismatched_accuracy_low": low,
        "eval/mismatched_accuracy_high": high,
    }


def reward_diagnostics(
    output: RewardOutput, batch: PreferenceBatch, objectives: Sequence[str], calibration: RewardCalibration | None
) -> Metrics:
    """The signals of docs/method.md section 10 on a whole held-out batch.

    Args:
        output: 2B rows, float64, chosen first. A field that the head does not compute has width 0.
        batch: the same rows.
        objectives: K names.
        calibration: of the finished model, fitted to a part of these pairs; None while it trains.

    Returns:
        Scale and calibration of the reward, its relation to length, the metrics of each source, and intervals of its
        accuracy. For a head that predicts annotations, how well its scores agree with them (`_reasons`). For a VRM or
        gate head, also active units, and the spread and supervision of the objective weights. With a posterior, also
        the concentration of the weights, the divergence of the least and the most used feature, and the accuracy of one
        posterior sample. Means are over the batch.
    """
    num_pairs = batch.num_pairs
    metrics = {
        "eval/reward_mean": float(output.mean.mean()),
        "eval/reward_std": float(output.mean.std(correction=0)),
        "eval/posterior_std": float(output.deviations.norm(dim=-1).mean()),
        "eval/latent_std": float(output.variance.sqrt().mean()),
        **_margin_metrics(output, batch, calibration),
        **_source_metrics(output, batch),
        **_accuracy_intervals(output, batch),
    }
    if output.alpha.shape[1]:
        alpha = output.alpha[:num_pairs]  # one row per prompt: that of the chosen response
        sampled = output.sampled[:num_pairs] - output.sampled[num_pairs:]
        zero = output.mu.new_zeros(1)
        kl_z = gaussian_kl_per_dimension(output.mu, output.logvar, zero, zero).mean(0)
        metrics |= {
            "eval/sampled_nll": float(bradley_terry_loss(sampled).mean()),
            "eval/sampled_accuracy": float(ranked_correctly(sampled).mean()),
            "eval/kl_z_least_dimension": float(kl_z.min()),
            "eval/kl_z_most_dimension": float(kl_z.max()),
            "eval/concentration_p05": float(alpha.sum(-1).quantile(0.05)),
            "eval/max_alpha": float(alpha.max()),
            "eval/concentration": float(alpha.sum(-1).mean()),
            "eval/concentration_p95": float(alpha.sum(-1).quantile(0.95)),
            "eval/min_alpha": float(alpha.min()),
        }
    if output.mu.shape[1]:
        # Normalised here in float64: correlations of nearly constant weights magnify rounding.
        weights = (output.alpha if output.alpha.shape[1] else output.weights)[:num_pairs]
        w_bar = weights / weights.sum(-1, keepdim=True)
        metrics |= {
            "eval/active_units": float((output.mu.var(0, correction=0) > ACTIVE_VARIANCE).sum()),
            "eval/weight_variance": float(w_bar.var(0, correction=0).mean()),
            "eval/weight_entropy": float(_entropy(w_bar).mean()),
            "eval/weight_distance_from_uniform": float((w_bar - 1.0 / w_bar.shape[1]).abs().sum(-1).mean()),
        }
        supervised = batch.target_mask.any(-1)
        if supervised.any():
            metrics["eval/target_entropy"] = float(_entropy(batch.target[supervised].double()).mean())
            metrics["eval/supervised_prompts"] = float(supervised.sum())
            correlations = target_correlations(w_bar, batch.target, batch.target_mask)
            metrics["eval/target_correlation"] = sum(correlations.values()) / len(correlations)
            metrics |= {f"eval/target_correlation_{k}": value for k, value in correlations.items()}
    return metrics | _reasons(output, batch, objectives)


def _reasons(output: RewardOutput, batch: PreferenceBatch, objectives: Sequence[str]) -> Metrics:
    """`reason_fidelity` of the predicted annotations. Where the reward is a sum over objectives, also `eval/scale`,
    what each objective adds to the mean margin, and the agreement with the truth where that is known."""
    own = output.annotation_scores
    metrics = reason_fidelity(own, batch.scores, batch.score_mask, objectives)
    if not output.scores.shape[1]:
        return metrics
    scale = float((output.scores * own).sum() / own.square().sum().clamp(min=1e-12))
    rewards = SummedRewards(weights=output.weights, scores=output.scores)
    metrics |= {"eval/scale": scale}
    metrics |= mean_margin_contributions(rewards, scale * batch.scores.to(own), batch.score_mask, objectives)
    if batch.truth is not None:
        named = verified_objectives(metrics, objectives)
        metrics |= agreement_with_truth(rewards, batch.truth, objectives, named)
    return metrics


def _accuracy_intervals(output: RewardOutput, batch: PreferenceBatch) -> Metrics:
    """95% intervals over prompts: `eval/accuracy_{low,high}`, and those of the accuracy minus that of the rule "longer
    is better", `eval/accuracy_over_length_{low,high}`. A tie counts one half. Nothing is said of a single prompt."""
    means = output.mean.cpu().numpy()
    margins = means[: batch.num_pairs] - means[batch.num_pairs :]
    gaps = np.array([len(chosen) - len(rejected) for chosen, rejected in (p.response_ids for p in batch.pairs)])
    right, by_length = 0.5 + 0.5 * np.sign(margins), 0.5 + 0.5 * np.sign(gaps)
    numbers: dict[tuple[int, ...], int] = {}
    prompts = [numbers.setdefault(pair.prompt_ids, len(numbers)) for pair in batch.pairs]
    if len(numbers) == 1:
        return {}
    intervals = bootstrap_intervals(
        lambda rows: {
            "eval/accuracy": float(right[rows].mean()),
            "eval/accuracy_over_length": float((right - by_length)[rows].mean()),
        },
        prompts,
        seed=0,
    )
    return {f"{name}_{end}": value for name, ends in intervals.items() for end, value in zip(ENDS, ends, strict=True)}


def _margin_metrics(output: RewardOutput, batch: PreferenceBatch, calibration: RewardCalibration | None) -> Metrics:
    """Calibration of the margins, and their relation to length."""
    means = output.mean.cpu().numpy()
    n = batch.num_pairs
    margins = means[:n] - means[n:]
    length_gap = np.array([len(chosen) - len(rejected) for chosen, rejected in (p.response_ids for p in batch.pairs)])
    margin_std = (output.deviations[:n] - output.deviations[n:]).norm(dim=-1).cpu().numpy()
    temperature = 1.0 if calibration is None else calibration.temperature
    pairs = ScoredPairs(
        chosen=means[:n],
        rejected=means[n:],
        margin_std=margin_std,
        log_odds=log_odds(margins, margin_std**2, temperature),
        length_gap=length_gap,
    )
    diagnostics = pair_diagnostics(pairs, answer_threshold=None)
    measured = _named(diagnostics, PAIR_METRICS) | {"eval/calibration_error": diagnostics["ece_uncalibrated"]}
    if calibration is not None:
        measured |= _reported(pairs, split_heldout(batch.pairs).report, calibration)
    quantiles = {f"eval/margin_p{q:02d}": float(np.quantile(margins, q / 100)) for q in MARGIN_QUANTILES}
    return quantiles | {"eval/length_slope": length_slope(margins, length_gap)} | measured


def _reported(pairs: ScoredPairs, rows: np.ndarray, calibration: RewardCalibration) -> Metrics:
    """`REPORTED_METRICS` on the rows that calibrated nothing; empty where there are none."""
    if not len(rows):
        return {}
    threshold = calibration.answer_threshold
    measured = _named(pair_diagnostics(pairs.take(rows), answer_threshold=threshold), REPORTED_METRICS)
    return {"eval/reported_pairs": float(len(rows)), "eval/answered": 0.0} | measured


def _named(measured: Metrics, names: Sequence[str]) -> Metrics:
    """`eval/<name>` of the metrics of these names. NaN means that there is no such pair, and is left out."""
    return {
        f"eval/{name.replace('/', '_')}": measured[name]
        for name in names
        if name in measured and not math.isnan(measured[name])
    }


def _source_metrics(output: RewardOutput, batch: PreferenceBatch) -> Metrics:
    means = output.mean.cpu().numpy()
    numbers: dict[tuple[int, ...], int] = {}
    return source_metrics(
        means[: batch.num_pairs] - means[batch.num_pairs :],
        np.array([len(chosen) - len(rejected) for chosen, rejected in (p.response_ids for p in batch.pairs)]),
        [numbers.setdefault(pair.prompt_ids, len(numbers)) for pair in batch.pairs],
        batch.sources,
    )


def target_correlations(w_bar: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> dict[int, float]:
    """Pearson correlation over prompts of inferred and target weight, for each objective that has targets.

    A prompt counts only for the objectives annotated on it. Its weights are renormalised over them, as in the loss.
    An objective whose weight or target does not vary has correlation 0.

    Args:
        w_bar, target, mask: [B, K].

    Returns:
        Index of the objective in the recipe's order -> correlation.
    """
    present = torch.where(mask, w_bar, torch.zeros_like(w_bar))
    present = present / present.sum(-1, keepdim=True).clamp(min=1e-12)
    return {
        k: _correlation(present[rows, k], target[rows, k].double())
        for k, rows in enumerate(mask.unbind(-1))
        if rows.any()
    }


def _correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return correlation_or_zero(x.cpu().numpy(), y.cpu().numpy())


def _entropy(p: torch.Tensor) -> torch.Tensor:
    """[B, K] -> [B] nats."""
    return -torch.xlogy(p, p).sum(-1)
