"""Alarms on the held-out metrics of a reward model, with advice for each (docs/method.md section 10).

An alarm is a hint to look, not a verdict. Early evaluations and small held-out sets raise some that vanish later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.records import Metrics

ALARM_PREFIX = "alarm/"

FEWEST_SUPERVISED_PROMPTS = 100
"""With fewer, a correlation of .05 is within its own standard error of .1."""


@dataclass(frozen=True)
class Alarm:
    """A failure mode, the metrics that show it, and the advice."""

    name: str
    signals: tuple[str, ...]
    is_raised: Callable[..., bool]
    """Takes the values of the signals, in their order."""
    advice: str
    unscored_advice: str | None = None
    """The advice where no training pair has objective scores, if another one: what weighs scores then does nothing."""


ALARMS = (
    Alarm(
        "z_collapse",
        ("eval/active_units", "eval/margin"),
        lambda units, margin: units < 2 or margin < 0.01,
        "the features say nothing of the response, so rewards are nearly equal. Lower loss.kl_weight_z, or warm it up.",
    ),
    Alarm(
        "w_collapse",
        ("eval/weight_variance",),
        lambda variance: variance < 1e-4,
        "every prompt gets the same objective weights. Raise loss.supervision_weight, or lower loss.kl_weight_w.",
        "every prompt gets the same objective weights, and no objective scores supervise them. Lower loss.kl_weight_w, "
        "or give annotated pairs.",
    ),
    Alarm(
        "over_concentration",
        ("eval/concentration_p95",),
        lambda concentration: concentration > 500,
        "the objective weights are all but certain. Raise loss.kl_weight_w.",
    ),
    Alarm(
        "small_alpha",
        ("eval/min_alpha",),
        lambda alpha: alpha < 0.1,
        "gradients through such concentrations are mostly noise. Raise vrm.alpha_min or loss.kl_weight_w.",
    ),
    Alarm(
        "latent_bypass",
        ("eval/accuracy", "eval/sampled_accuracy"),
        lambda accuracy, sampled: abs(accuracy - sampled) > 0.05,
        "a posterior sample ranks unlike the posterior mean: the variances do not mean what they say. "
        "Change loss.kl_weight_z.",
    ),
    Alarm(
        "collinear_scores",
        ("reasons/collinearity",),
        lambda correlation: correlation > 0.95,
        "the objective scores are one score under several names. Set loss.score_weight, or raise vrm.semantic_dims.",
        "the objectives are one score several times, and no objective scores tell them apart. Raise "
        "vrm.semantic_dims, or give annotated pairs.",
    ),
    Alarm(
        "scale",
        ("eval/scale",),
        lambda tau: not 0.02 < tau < 50,
        "the learned scale of the reward has collapsed or exploded: rewards are all alike, or their order is certain. "
        "Lower head_learning_rate, or set vrm.learned_scale=false.",
    ),
    Alarm(
        "scale_drift",
        ("train/reward_std", "eval/reward_std"),
        lambda train, heldout: max(train, heldout) > 2 * min(train, heldout),
        "rewards of training and held-out responses differ twofold in scale. Look at the data, or train less long.",
    ),
    Alarm(
        "miscalibration",
        ("eval/ece",),
        lambda error: error > 0.1,
        "confidence and accuracy differ. Smooth the labels (pair_loss.label_smoothing), or train less long.",
    ),
    Alarm(
        "length_bias",
        ("eval/length_correlation",),
        lambda correlation: correlation > 0.4,
        "rewards follow the length of responses. Compare eval/longer_is_better of the data, and balance it.",
    ),
    Alarm(
        "supervision_mismatch",
        ("eval/target_correlation", "eval/supervised_prompts"),
        lambda correlation, prompts: correlation < 0.05 and prompts >= FEWEST_SUPERVISED_PROMPTS,
        "the inferred weights do not follow their targets on held-out prompts. Raise loss.supervision_weight.",
    ),
    Alarm(
        "memorised_prompts",
        ("train/accuracy", "eval/accuracy"),
        lambda train, heldout: train - heldout > 0.08,
        "training pairs are ranked better than held-out ones. Train less long, or give more prompts. "
        "One training batch is noisy: look at the curve.",
    ),
)


def check_alarms(metrics: Metrics, alarms: Sequence[Alarm] = ALARMS) -> Metrics:
    """`alarm/<name>`, 1 or 0, for every alarm whose signals were measured, and `eval/alarms`, the number raised.

    Args:
        metrics: those of one evaluation, and of the update before it if there was one.
        alarms: those of a reward model, unless given.
    """
    checked = {
        ALARM_PREFIX + alarm.name: float(alarm.is_raised(*(metrics[signal] for signal in alarm.signals)))
        for alarm in alarms
        if all(signal in metrics for signal in alarm.signals)
    }
    return checked | {"eval/alarms": sum(checked.values())}


def alarm_messages(metrics: Metrics, alarms: Sequence[Alarm] = ALARMS, *, are_pairs_scored: bool) -> list[str]:
    """One line for each alarm raised in `metrics`: its name, its signals and the advice.

    Args:
        are_pairs_scored: whether any training pair has objective scores.
    """
    return [
        f"alarm {alarm.name} ("
        + ", ".join(f"{signal} = {metrics[signal]:.3g}" for signal in alarm.signals if signal in metrics)
        + f"): {alarm.advice if are_pairs_scored or alarm.unscored_advice is None else alarm.unscored_advice}"
        for alarm in alarms
        if metrics.get(ALARM_PREFIX + alarm.name)
    ]
