"""Alarms go off on their side of the threshold, and only where their signals were measured."""

import math
import re

import pytest
import torch

from pipeline.config.reward import RewardConfig
from pipeline.evaluation.alarms import REWARD_ALARMS, alarm_messages, check_alarms
from pipeline.models.reward_heads import SCALE_SPEED
from tests.support.learners import collator, reward_trainer, tokenised

HEALTHY = {
    "train/accuracy": 0.80,
    "train/pairs": 100.0,
    "train/reward_std": 1.0,
    "eval/accuracy": 0.75,
    "eval/sampled_accuracy": 0.73,
    "eval/active_units": 16.0,
    "eval/margin": 1.2,
    "eval/weight_variance": 0.01,
    "eval/concentration_p95": 20.0,
    "eval/min_alpha": 0.5,
    "reasons/collinearity": 0.4,
    "eval/reward_std": 1.3,
    "eval/scale": 3.0,
    "eval/ece": 0.04,
    "eval/reported_pairs": 150.0,
    "eval/length_correlation": 0.1,
    "eval/target_correlation": 0.3,
    "eval/supervised_prompts": 100.0,
}


def test_a_healthy_model_raises_no_alarm_and_all_are_checked():
    checked = check_alarms(HEALTHY)
    assert set(checked) == {f"alarm/{alarm.name}" for alarm in REWARD_ALARMS} | {"eval/alarms"}
    assert set(checked.values()) == {0.0}
    assert alarm_messages(HEALTHY | checked, are_pairs_scored=True) == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("z_collapse", {"eval/active_units": 1.0}),
        ("z_collapse", {"eval/margin": 0.009}),
        ("w_collapse", {"eval/weight_variance": 0.9e-4}),
        ("over_concentration", {"eval/concentration_p95": 501.0}),
        ("small_alpha", {"eval/min_alpha": 0.09}),
        ("latent_bypass", {"eval/sampled_accuracy": 0.69}),
        ("collinear_scores", {"reasons/collinearity": 0.96}),
        ("scale", {"eval/scale": 0.019}),
        ("scale", {"eval/scale": 51.0}),
        ("scale_drift", {"eval/reward_std": 2.1}),
        ("scale_drift", {"eval/reward_std": 0.49}),
        ("miscalibration", {"eval/ece": 0.11}),
        ("length_bias", {"eval/length_correlation": 0.41}),
        ("supervision_mismatch", {"eval/target_correlation": 0.04}),
        ("memorised_prompts", {"train/accuracy": 0.94}),
    ],
)
def test_each_failure_raises_its_alarm_and_no_other(name, change):
    checked = check_alarms(HEALTHY | change)
    assert [key for key, value in checked.items() if value] == [f"alarm/{name}", "eval/alarms"]
    assert checked["eval/alarms"] == 1.0


@pytest.mark.parametrize(
    "change",
    [
        {"eval/active_units": 2.0, "eval/margin": 0.011},
        {"eval/weight_variance": 1.1e-4},
        {"eval/concentration_p95": 499.0},
        {"eval/min_alpha": 0.11},
        {"eval/sampled_accuracy": 0.71},
        {"reasons/collinearity": 0.94},
        {"eval/scale": 0.021},
        {"eval/scale": 49.0},
        {"eval/reward_std": 1.9},
        {"eval/reward_std": 0.51},
        {"eval/ece": 0.09},
        {"eval/ece": 0.4, "eval/reported_pairs": 149.0},
        {"eval/length_correlation": 0.39},
        {"eval/target_correlation": 0.06},
        {"eval/target_correlation": -0.2, "eval/supervised_prompts": 99.0},
        {"train/accuracy": 0.92},
    ],
)
def test_on_the_safe_side_nothing_rings(change):
    assert check_alarms(HEALTHY | change)["eval/alarms"] == 0.0


def test_what_was_not_measured_cannot_alarm():
    bradley_terry = {
        "eval/accuracy": 0.7,
        "eval/margin": 0.0,
        "eval/ece": 0.3,
        "eval/reported_pairs": 150.0,
        "eval/length_correlation": 0.1,
    }
    assert check_alarms(bradley_terry) == {"alarm/miscalibration": 1.0, "alarm/length_bias": 0.0, "eval/alarms": 1.0}


def test_the_letter_gives_the_value_and_the_cure():
    metrics = HEALTHY | {"eval/min_alpha": 0.05}
    [letter] = alarm_messages(metrics | check_alarms(metrics), are_pairs_scored=True)
    assert letter.startswith("alarm small_alpha (eval/min_alpha = 0.05): ")
    assert "Raise vrm.alpha_min" in letter


def test_every_setting_that_an_advice_names_exists():
    named = [
        path
        for alarm in REWARD_ALARMS
        for path in re.findall(r"\b(?:loss|pair_loss|vrm)\.\w+|\bhead_learning_rate\b", alarm.advice)
    ]
    assert len(named) >= 10
    for path in named:
        setting = RewardConfig()
        for part in path.split("."):
            setting = getattr(setting, part)  # an AttributeError names the setting


@pytest.mark.parametrize(("tau", "raised"), [(0.01, 1.0), (0.05, 0.0), (40.0, 0.0), (80.0, 1.0)])
def test_a_head_whose_scale_collapsed_or_exploded_raises_the_alarm_on_held_out_pairs(
    tau, raised, tiny_policy, world, tokenizer
):
    trainer = reward_trainer(tiny_policy, world, tokenizer)
    with torch.no_grad():
        trainer.engine.module.head.units.rho.fill_(math.log(tau) / SCALE_SPEED)
    metrics = trainer.evaluate(collator(world, tokenizer)(tokenised(world, tokenizer, "heldout"), 0))
    assert metrics["eval/scale"] == pytest.approx(tau, rel=1e-3)
    assert metrics["alarm/scale"] == raised
    messages = alarm_messages(metrics, are_pairs_scored=True)
    assert any("vrm.learned_scale=false" in message for message in messages) == bool(raised)


@pytest.mark.parametrize(
    ("change", "without_effect"),
    [({"eval/weight_variance": 0.0}, "supervision_weight"), ({"reasons/collinearity": 1.0}, "score_weight")],
)
def test_without_scores_no_alarm_advises_a_weight_of_scores(change, without_effect):
    metrics = HEALTHY | change
    [scored], [unscored] = (
        alarm_messages(metrics | check_alarms(metrics), are_pairs_scored=scored) for scored in (True, False)
    )
    assert without_effect in scored
    assert without_effect not in unscored
    assert "no objective scores" in unscored
