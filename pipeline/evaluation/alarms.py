"""Every alarm there is, with its threshold and its advice; docs/alarms.md shows the same table.

An alarm is a hint to look, not a verdict. Early evaluations and small held-out sets raise some that vanish later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.records import Metrics
from pipeline.tracking.alarm_names import ALARM_PREFIX

FEWEST_SUPERVISED_PROMPTS = 100
"""With fewer, a correlation of .05 is within its own standard error of .1."""


FEWEST_CALIBRATED_PAIRS = 150
"""Ten in each of 15 bins. With fewer, the calibration error of a calibrated model is above .1 by chance."""


@dataclass(frozen=True)
class Alarm:
    """A failure mode, the metrics that show it, and the advice."""

    name: str
    signals: tuple[str, ...]
    is_raised: Callable[..., bool]
    """Takes the values of the signals, in their order."""
    raised_when: str
    """What `is_raised` says, in words; with the unit of each threshold."""
    advice: str
    unscored_advice: str | None = None
    """The advice where no training pair has objective scores, if another one: what weighs scores then does nothing."""


REWARD_ALARMS = (
    Alarm(
        "z_collapse",
        ("eval/active_units", "eval/margin"),
        lambda units, margin: units < 2 or margin < 0.01,
        "fewer than 2 semantic units are active (variance of `mu_j` above .01), or the mean margin is below .01",
        "the features say nothing of the response, so rewards are nearly equal. Lower loss.kl_weight_z, or warm it up.",
    ),
    Alarm(
        "w_collapse",
        ("eval/weight_variance",),
        lambda variance: variance < 1e-4,
        "the variance of `w_bar` over prompts is below 1e-4",
        "every prompt gets the same objective weights. Raise loss.supervision_weight, or lower loss.kl_weight_w.",
        "every prompt gets the same objective weights, and no objective scores supervise them. Lower loss.kl_weight_w, "
        "or give annotated pairs.",
    ),
    Alarm(
        "over_concentration",
        ("eval/concentration_p95",),
        lambda concentration: concentration > 500,
        "the 95th percentile of the concentration `A` is above 500",
        "the objective weights are all but certain. Raise loss.kl_weight_w.",
    ),
    Alarm(
        "small_alpha",
        ("eval/min_alpha",),
        lambda alpha: alpha < 0.1,
        "the smallest `alpha` is below .1",
        "gradients through such concentrations are mostly noise. Raise vrm.alpha_min or loss.kl_weight_w.",
    ),
    Alarm(
        "latent_bypass",
        ("eval/accuracy", "eval/sampled_accuracy"),
        lambda accuracy, sampled: abs(accuracy - sampled) > 0.05,
        "the held-out accuracies of posterior sample and posterior mean differ by more than .05",
        "a posterior sample ranks unlike the posterior mean: the variances do not mean what they say. "
        "Change loss.kl_weight_z.",
    ),
    Alarm(
        "collinear_scores",
        ("reasons/collinearity",),
        lambda correlation: correlation > 0.95,
        "the mean absolute correlation of objective scores is above .95",
        "the objective scores are one score under several names. Set loss.score_weight, or raise vrm.semantic_dims.",
        "the objectives are one score several times, and no objective scores tell them apart. Raise "
        "vrm.semantic_dims, or give annotated pairs.",
    ),
    Alarm(
        "scale",
        ("eval/scale",),
        lambda tau: not 0.02 < tau < 50,
        "the learned scale `tau` lies outside [.02, 50]",
        "the learned scale of the reward has collapsed or exploded: rewards are all alike, or their order is certain. "
        "Lower head_learning_rate, or set vrm.learned_scale=false.",
    ),
    Alarm(
        "scale_drift",
        ("train/reward_std", "eval/reward_std"),
        lambda train, heldout: max(train, heldout) > 2 * min(train, heldout),
        "the standard deviations of rewards of training and held-out responses differ by more than a factor of 2",
        "rewards of training and held-out responses differ twofold in scale. Look at the data, or train less long.",
    ),
    Alarm(
        "miscalibration",
        ("eval/ece", "eval/reported_pairs"),
        lambda error, pairs: error > 0.1 and pairs >= FEWEST_CALIBRATED_PAIRS,
        f"the calibration error of the probability is above .1, over at least {FEWEST_CALIBRATED_PAIRS} pairs",
        "confidence and accuracy differ. Smooth the labels (pair_loss.label_smoothing), or train less long.",
    ),
    Alarm(
        "length_bias",
        ("eval/length_correlation",),
        lambda correlation: correlation > 0.4,
        "the correlation of reward and length is above .4",
        "rewards follow the length of responses. Compare eval/longer_is_better of the data, and balance it.",
    ),
    Alarm(
        "supervision_mismatch",
        ("eval/target_correlation", "eval/supervised_prompts"),
        lambda correlation, prompts: correlation < 0.05 and prompts >= FEWEST_SUPERVISED_PROMPTS,
        "the correlation of inferred weights and their targets is below .05, "
        f"over at least {FEWEST_SUPERVISED_PROMPTS} prompts",
        "the inferred weights do not follow their targets on held-out prompts. Raise loss.supervision_weight.",
    ),
    Alarm(
        "memorised_prompts",
        ("train/accuracy", "train/pairs", "eval/accuracy"),
        # Two standard errors of the accuracy on one batch are at most 1 / sqrt(pairs).
        lambda train, pairs, heldout: train - heldout > 0.08 + pairs**-0.5,
        "the accuracy on the last training batch exceeds the held-out accuracy by more than .08 + 1 / sqrt(its pairs)",
        "training pairs are ranked better than held-out ones. Train less long, or give more prompts.",
    ),
)

FAR_NATS_PER_TOKEN = 0.5
"""A response of 200 tokens is then e^100 times less likely than before."""

LENGTH_CORRELATION = 0.8
"""Of difficulties with lengths; in the planted world 0.96 went with a policy that lost to its start."""

DIFFICULTY_ALARMS = (
    Alarm(
        "difficulty_is_length",
        ("difficulty/length_correlation",),
        lambda correlation: abs(correlation) > LENGTH_CORRELATION,
        "the correlation of difficulties with differences in length is above .8 or below -.8",
        "the difficulty of a pair is nearly the difference of its responses in length, so the easiest pairs teach "
        "length. Train the models of the difficulties for longer: direct.difficulty.epochs, direct.difficulty.beta.",
    ),
)

DIRECT_ALARMS = (
    Alarm(
        "likelihood_displacement",
        ("eval/chosen_change_per_token", "eval/rejected_change_per_token"),
        lambda chosen, rejected: max(chosen, rejected) < -FAR_NATS_PER_TOKEN,
        "held-out chosen and rejected responses both lost more than .5 nats a token",
        "chosen and rejected responses both became far less likely, so other responses became likely, and nobody has "
        "judged those. Lower direct.optimiser.learning_rate, raise direct.beta, or add direct.losses.likelihood.",
    ),
)

FAR_KL = 10.0
"""Nats a response. A policy that far from its start often fools the reward model (docs/LOG.md, over-optimisation)."""

POLICY_ALARMS = (
    Alarm(
        "far_from_start",
        ("kl/per_response",),
        lambda kl: kl > FAR_KL,
        "the KL to the reference is above 10 nats a response",
        "a policy that far from its start often fools the reward model. Read the samples; raise "
        "alignment.kl.coefficient, or set alignment.kl.stop_above.",
    ),
    Alarm(
        "length_drift",
        ("drift/length",),
        lambda growth: not 0.5 <= growth <= 2.0,
        "the mean length of responses is less than half or more than twice that of the first steps",
        "the policy changes the length of its responses, which may be all that the reward asks for. Read the samples; "
        "compare eval/longer_is_better of the reward model.",
    ),
    Alarm(
        "entropy_collapse",
        ("drift/entropy",),
        lambda share: share < 1 / 3,
        "the entropy of the policy, in nats a token, is below one third of that of the first steps",
        "the policy writes nearly the same to every prompt, and has stopped to explore. Raise "
        "alignment.kl.coefficient, or lower the learning rate of the policy.",
    ),
    Alarm(
        "repetition",
        ("drift/repetition",),
        lambda growth: growth > 0.2,
        "the mean share of repeated 4-grams in a response is more than .2 above that of the first steps",
        "the policy repeats itself. Read the samples; raise alignment.kl.coefficient, or stop earlier.",
    ),
    Alarm(
        "reward_without_validation",
        ("drift/reward_gap",),
        lambda gap: gap > 1.0,
        "since the first validation the reward of training prompts has grown more than that of validation prompts, by "
        "more than 1 standard deviation of the rewards of the first step",
        "the policy gains on its training prompts what it does not gain on others. Give more prompts, or stop earlier.",
    ),
    Alarm(
        "engine_gap",
        ("engine_gap/mean",),
        lambda gap: gap > 0.1,
        "log-probabilities of engine and learner differ by more than .1 nats a token in the mean",
        "the update corrects samples of another policy than the one it believes in. Compare the dtype of engine and "
        "learner, and set alignment.ppo.tis_cap.",
    ),
)
"""Signs that a policy exploits the reward model, or that its updates no longer mean what they say."""


def check_alarms(
    metrics: Metrics, alarms: Sequence[Alarm] = REWARD_ALARMS, *, counted_as: str = "eval/alarms"
) -> Metrics:
    """`alarm/<name>`, 1 or 0, for every alarm whose signals were measured, and the number raised.

    Args:
        metrics: those of one evaluation, and of the update before it if there was one.
        alarms: those of a reward model, unless given.
        counted_as: the metric of the number raised.
    """
    checked = {
        ALARM_PREFIX + alarm.name: float(alarm.is_raised(*(metrics[signal] for signal in alarm.signals)))
        for alarm in alarms
        if all(signal in metrics for signal in alarm.signals)
    }
    return checked | {counted_as: sum(checked.values())}


def alarm_messages(
    metrics: Mapping[str, float], alarms: Sequence[Alarm] = REWARD_ALARMS, *, are_pairs_scored: bool
) -> list[str]:
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
