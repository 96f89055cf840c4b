"""Diagnostics of the reward model on batches small enough to work out by hand."""

import math
from dataclasses import replace

import pytest
import torch

from pipeline.evaluation.calibration import split_heldout
from pipeline.evaluation.reward_diagnostics import mismatched_accuracy, reward_diagnostics, target_correlations
from pipeline.models.reward_heads import RewardOutput
from pipeline.models.reward_model_card import RewardCalibration
from pipeline.records import ObjectiveTruth, PreferenceBatch, PromptGroup


def batch_of(lengths, target=None, mask=None):
    num_pairs = len(lengths) // 2
    target = torch.zeros(num_pairs, 2) if target is None else torch.tensor(target)
    return PreferenceBatch(
        pairs=tuple(
            PromptGroup(prompt_ids=(1,), response_ids=((2,) * chosen, (2,) * rejected))
            for chosen, rejected in zip(lengths[:num_pairs], lengths[num_pairs:], strict=True)
        ),
        target=target,
        target_mask=torch.zeros(num_pairs, 2, dtype=torch.bool) if mask is None else torch.tensor(mask),
        noise_seeds=torch.zeros(num_pairs, dtype=torch.int64),
        scores=torch.zeros(len(lengths), 2),
        score_mask=torch.zeros(len(lengths), 2, dtype=torch.bool),
        margins=torch.full((num_pairs,), math.nan),
        sources=("mine",) * num_pairs,
    )


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def test_diagnostics_of_two_pairs_by_hand():
    output = RewardOutput(
        sampled=double([2.0, 0.0, 1.0, 0.0]),
        mean=double([3.0, 1.0, 1.0, -1.0]),
        variance=double([4.0, 4.0, 4.0, 4.0]),
        alpha=double([[3.0, 1.0], [2.0, 6.0], [9.0, 9.0], [9.0, 9.0]]),
        mu=double([[0.0, 1.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.1]]),
        logvar=torch.zeros(4, 2, dtype=torch.float64),
        scores=double([[1.0, -2.0], [2.0, -4.0], [3.0, -6.0], [4.0, -8.0]]),
        annotation_scores=double([[0.5, -1.0], [1.0, -2.0], [1.5, -3.0], [2.0, -4.0]]),
        weights=double([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5], [0.5, 0.5]]),
        deviations=double([[3.0, 0.0], [0.0, 1.0], [3.0, 4.0], [0.0, 1.0]]),
        prompt_features=torch.zeros(4, 0, dtype=torch.float64),
        response_features=torch.zeros(4, 0, dtype=torch.float64),
    )
    batch = batch_of([5, 4, 3, 4], target=[[0.5, 0.5], [1.0, 0.0]], mask=[[True] * 2] * 2)
    metrics = reward_diagnostics(output, batch, ("honesty", "safety"), None)

    assert metrics["eval/prefers_longer"] == 1.0  # the second pair has equal lengths
    assert metrics["eval/calibration_error"] == pytest.approx(1.0 - 1.0 / (1.0 + math.exp(-2.0)))
    assert metrics["eval/reward_mean"] == 1.0
    assert metrics["eval/reward_std"] == pytest.approx(math.sqrt(2.0))  # deviations 2, 0, 0, -2
    assert metrics["eval/latent_std"] == 2.0
    assert metrics["eval/posterior_std"] == 2.5  # lengths 3, 1, 5 and 1
    assert metrics["eval/active_units"] == 1.0  # variances 1/4 and about 0.002
    assert metrics["eval/weight_variance"] == pytest.approx(1 / 16)  # w_bar (3/4, 1/4) and (1/4, 3/4)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert metrics["eval/weight_entropy"] == pytest.approx(entropy)
    assert metrics["eval/concentration"] == 6.0
    assert metrics["eval/concentration_p95"] == pytest.approx(4.0 + 0.95 * 4.0)
    assert metrics["eval/concentration_p05"] == pytest.approx(4.0 + 0.05 * 4.0)
    assert metrics["eval/min_alpha"] == 1.0  # the rejected rows do not speak
    assert metrics["eval/max_alpha"] == 6.0
    assert metrics["eval/weight_distance_from_uniform"] == 0.5  # 1/4 + 1/4, twice
    # Margins of the means 2 and 2, of the sample 1 and 0: a tie is an error.
    assert metrics["eval/brier"] == pytest.approx((1 - 1 / (1 + math.exp(-2.0))) ** 2)
    assert metrics["eval/sampled_accuracy"] == 0.5
    assert metrics["eval/sampled_nll"] == pytest.approx((math.log(1 + math.exp(-1.0)) + math.log(2.0)) / 2)
    # Unit variances: KL_z of a dimension is mu^2 / 2, on average 1/4 and (1 + 1 + 1 + 1.21) / 8
    assert metrics["eval/kl_z_least_dimension"] == pytest.approx(0.25)
    assert metrics["eval/kl_z_most_dimension"] == pytest.approx(4.21 / 8)
    assert metrics["reasons/collinearity"] == pytest.approx(1.0)  # the second score is -2 times the first
    assert metrics["eval/scale"] == pytest.approx(2.0)
    assert metrics["eval/accuracy_chosen_longer"] == 1.0  # 5 against 3 tokens, and 4 against 4
    assert "eval/accuracy_chosen_shorter" not in metrics
    assert metrics["eval/target_entropy"] == pytest.approx(math.log(2.0) / 2)
    assert metrics["eval/target_correlation"] == pytest.approx(-1.0)
    assert metrics["eval/target_correlation_1"] == pytest.approx(-1.0)
    assert metrics["eval/supervised_prompts"] == 2.0
    assert [metrics[f"eval/margin_p{q}"] for q in ("05", "50", "95")] == [2.0, 2.0, 2.0]
    assert metrics["eval/length_slope"] == 1.0  # margins 2 and 2, gaps 2 and 0: 4 / 4
    assert "eval/ece" not in metrics  # nothing is calibrated while the model trains


def test_a_calibrated_model_is_measured_on_the_pairs_that_had_no_part_in_it():
    prompts = [(n,) for n in range(40)]
    pairs = tuple(PromptGroup(prompt_ids=p, response_ids=((1,), (2,))) for p in prompts)
    batch = replace(
        batch_of([1] * 80),
        pairs=pairs,
        scores=torch.zeros(80, 2),
        score_mask=torch.zeros(80, 2, dtype=torch.bool),
    )
    report = split_heldout(pairs).report
    # Of the reported pairs one is wrong by a small margin; all others are wrong.
    margins = torch.full((40,), -5.0, dtype=torch.float64)
    margins[report] = 2.0
    margins[report[0]] = -1.0
    rewards = torch.cat([margins, torch.zeros(40, dtype=torch.float64)])
    nothing = torch.zeros(80, 0, dtype=torch.float64)
    output = RewardOutput(rewards, rewards, torch.zeros_like(rewards), *[nothing] * 9)
    calibration = RewardCalibration(temperature=2.0, answer_threshold=0.6)
    metrics = reward_diagnostics(output, batch, ("a", "b"), calibration)
    n = len(report)
    assert metrics["eval/reported_pairs"] == n
    # The log-odds are 1 and, once, -1/2: below the threshold, so no answer is wrong.
    assert (metrics["eval/answered"], metrics["eval/answered_error"]) == ((n - 1) / n, 0.0)
    expected = ((n - 1) * math.log1p(math.exp(-1.0)) + math.log1p(math.exp(0.5))) / n
    assert metrics["eval/calibrated_nll"] == pytest.approx(expected)
    # Bins of equal mass: the one with the error holds a few of the others, each bin counts its own gap.
    assert 0.0 < metrics["eval/ece"] != metrics["eval/ece_uncalibrated"]
    silent = calibration.model_copy(update={"answer_threshold": None})
    assert reward_diagnostics(output, batch, ("a", "b"), silent)["eval/answered"] == 0.0


def test_responses_that_beat_one_to_another_prompt_are_counted_and_a_tie_is_none():
    metrics = mismatched_accuracy(torch.tensor([1.0, -2.0, 3.0, 0.0]))
    assert metrics["eval/mismatched_accuracy"] == 0.5
    # Wilson: centre .5, half the width z / (1 + z^2/4) sqrt(1/16 + z^2/64) with z = 1.96.
    assert metrics["eval/mismatched_accuracy_low"] == pytest.approx(0.150, abs=1e-3)
    assert metrics["eval/mismatched_accuracy_high"] == pytest.approx(0.850, abs=1e-3)


def test_the_accuracy_has_an_interval_over_prompts_and_one_against_length():
    nothing = torch.zeros(40, 0, dtype=torch.float64)
    margins = [1.0] * 15 + [-1.0] * 5
    mean = double([*margins, *[0.0] * 20])
    batch = batch_of([4] * 10 + [2] * 10 + [3] * 20)  # half of the chosen responses are the longer ones
    pairs = tuple(replace(pair, prompt_ids=(n,)) for n, pair in enumerate(batch.pairs))
    output = RewardOutput(mean, mean, torch.zeros(40), *[nothing] * 9)
    metrics = reward_diagnostics(output, replace(batch, pairs=pairs), ("a", "b"), None)
    # 20 independent trials at 3/4: the normal approximation gives 0.75 +- 0.19.
    assert metrics["eval/accuracy_low"] == pytest.approx(0.55, abs=0.06)
    assert metrics["eval/accuracy_high"] == pytest.approx(0.95, abs=0.06)
    assert metrics["eval/accuracy_over_length_low"] < 0.25 < metrics["eval/accuracy_over_length_high"]
    # As sure as length of every pair: the paired interval has no width.
    by_length = RewardOutput(*[double([1.0] * 10 + [-1.0] * 10 + [0.0] * 20)] * 2, torch.zeros(40), *[nothing] * 9)
    same = reward_diagnostics(by_length, replace(batch, pairs=pairs), ("a", "b"), None)
    assert (same["eval/accuracy_over_length_low"], same["eval/accuracy_over_length_high"]) == (0.0, 0.0)


def test_reasons_of_a_batch_with_annotations_and_the_truth():
    output = RewardOutput(
        sampled=double([2.0, 0.0]),
        mean=double([2.0, 0.0]),
        variance=double([0.0, 0.0]),
        alpha=torch.zeros(2, 0, dtype=torch.float64),
        mu=torch.zeros(2, 0, dtype=torch.float64),
        logvar=torch.zeros(2, 0, dtype=torch.float64),
        scores=double([[4.0, 0.0], [0.0, 0.0]]),
        annotation_scores=double([[2.0, 0.0], [0.0, 0.0]]),
        weights=double([[0.5, 0.5], [0.5, 0.5]]),
        deviations=torch.zeros(2, 0, dtype=torch.float64),
        prompt_features=torch.zeros(2, 0, dtype=torch.float64),
        response_features=torch.zeros(2, 0, dtype=torch.float64),
    )
    batch = replace(
        batch_of([3, 3]),
        scores=torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
        score_mask=torch.ones(2, 2, dtype=torch.bool),
        truth=ObjectiveTruth(weights=double([[0.9, 0.1]]), scores=double([[5.0, 1.0], [1.0, 1.0]])),
    )
    metrics = reward_diagnostics(output, batch, ("honesty", "safety"), None)
    assert metrics["eval/scale"] == pytest.approx(2.0)
    # The annotation is one standard deviation, which is two units of the reward, at weight 1/2.
    assert metrics["reasons/honesty/contribution"] == pytest.approx(2.0)
    assert metrics["reasons/honesty/contribution_by_annotations"] == pytest.approx(1.0)
    assert metrics["reasons/decisive_pairs"] == 0.0  # one pair verifies nothing
    assert "reasons/weight_correlation" in metrics
    assert "reasons/weight_correlation" not in reward_diagnostics(
        output, replace(batch, truth=None), ("honesty", "safety"), None
    )


def test_a_bradley_terry_head_has_no_posterior_to_diagnose():
    nothing = torch.zeros(2, 0, dtype=torch.float64)
    output = RewardOutput(double([1, 0]), double([1, 0]), double([0, 0]), *[nothing] * 9)
    assert reward_diagnostics(output, batch_of([3, 3]), ("a", "b"), None).keys() == {
        "eval/reward_mean",
        "eval/reward_std",
        "eval/posterior_std",
        "eval/latent_std",
        "eval/calibration_error",
        "eval/brier",
        "eval/prefers_longer",
        "eval/length_correlation",
        "eval/length_slope",
        "eval/margin_p05",
        "eval/margin_p50",
        "eval/margin_p95",
        "eval/source/mine/pairs",
        "eval/source/mine/accuracy",
        "eval/source/mine/nll",
        "eval/source/mine/longer_is_better",
    }


def test_correlation_uses_the_annotated_objectives_and_ignores_what_does_not_vary():
    w_bar = double([[0.2, 0.3, 0.5], [0.4, 0.1, 0.5], [0.6, 0.3, 0.1]])
    mask = torch.tensor([[True, True, False]] * 3)
    # Renormalised over the first two: 0.4, 0.8, 2/3. Targets 0.4, 0.8, 2/3: correlation 1; the third has none.
    target = torch.tensor([[0.4, 0.6, 0.0], [0.8, 0.2, 0.0], [2 / 3, 1 / 3, 0.0]])
    assert target_correlations(w_bar, target, mask) == pytest.approx({0: 1.0, 1: 1.0})
    assert target_correlations(w_bar, torch.full((3, 3), 0.5), mask) == {0: 0.0, 1: 0.0}
