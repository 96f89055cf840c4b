"""Metrics of preference pairs on numbers small enough to work out by hand, and on published reward scores."""

import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ShapeError
from pipeline.evaluation.pair_metrics import (
    ScoredPairs,
    accuracy_metrics,
    calibration,
    calibration_error,
    calibration_error_by_chance,
    length_correlation,
    longer_is_better,
    pair_diagnostics,
    prefers_longer,
    risk_coverage_area,
)
from tests.support.paths import SHARED_DATA

LN3 = math.log(3.0)  # sigmoid(ln 3) = 3/4


def numbers(*values):
    return np.array(values, dtype=np.float64)


def test_a_tie_is_wrong_or_one_half():
    assert accuracy_metrics(numbers(1.0, 0.0, -2.0, 3.0)) == {"accuracy": 0.5, "accuracy_tie_half": 0.625, "ties": 0.25}


def test_accuracy_reproduces_the_published_judgebench_numbers():
    file = SHARED_DATA / "judgebench" / "reward_model_scores.parquet"
    if not file.exists():
        pytest.skip(f"{file} is not here: the scores that published reward models gave on JudgeBench")
    margins = {}
    for row in pq.read_table(file).to_pylist():
        sign = 1.0 if row["label"] == "A>B" else -1.0
        margins.setdefault(row["judge_model"], []).append(sign * (row["score_A"] - row["score_B"]))
    accuracy = {name: accuracy_metrics(np.array(values)) for name, values in margins.items()}
    published = {
        "Ray2333/GRM-Gemma-2B-rewardmodel-ft": 59.43,
        "Skywork/Skywork-Reward-Llama-3.1-8B": 62.29,
        "internlm/internlm2-7b-reward": 59.43,
    }
    assert {name: round(100 * metrics["accuracy"], 2) for name, metrics in accuracy.items()} == published
    # One tie among Skywork's 350, counted as wrong there.
    assert accuracy["Skywork/Skywork-Reward-Llama-3.1-8B"]["accuracy_tie_half"] == pytest.approx(218.5 / 350)


def test_likelihood_and_brier_score_of_two_pairs_by_hand():
    metrics = calibration(numbers(LN3, -LN3))  # p = 3/4 and 1/4
    assert metrics["nll"] == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    assert metrics["brier"] == pytest.approx((0.25**2 + 0.75**2) / 2)
    assert calibration(numbers(0.0))["nll"] == pytest.approx(math.log(2.0))


def test_a_huge_wrong_margin_costs_its_size_and_does_not_overflow():
    assert calibration(numbers(-1000.0))["nll"] == pytest.approx(1000.0)
    assert calibration(numbers(1000.0))["nll"] == 0.0


def test_calibration_error_is_the_distance_of_confidence_from_accuracy():
    # One pair a bin: |accuracy - sigmoid(|margin|)|; the wrong pair is 3/4 away.
    assert calibration_error(numbers(LN3)) == pytest.approx(0.25)
    # Two rows of one confidence, 3/4, of which one is right: no bin may part them.
    assert calibration_error(numbers(LN3, -LN3)) == pytest.approx(0.25)
    assert calibration_error(np.zeros(32)) == 0.0  # a coin that says it is one: confidence 1/2, ties count 1/2
    # Sixty pairs in 15 bins of 4: three of four right at confidence 3/4 is perfect calibration.
    assert calibration_error(np.tile([LN3, LN3, LN3, -LN3], 15)) == pytest.approx(0.0)


def test_risk_coverage_area_by_hand():
    # By confidence: right, right, wrong, right. Errors of the k surest: 0, 0, 1/3, 1/4.
    errors, confidence = numbers(0, 1, 0, 0), numbers(9, 3, 7, 1)
    assert risk_coverage_area(errors, confidence) == pytest.approx((0 + 0 + 1 / 3 + 1 / 4) / 4)
    # The worst confidence puts the error first, and ties the others: 1, 1/2, 1/3, 1/4.
    assert risk_coverage_area(errors, errors) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_equal_confidence_knows_nothing_whatever_the_order_of_the_rows():
    for errors in (numbers(1, 0, 0, 0), numbers(0, 0, 0, 1)):
        assert risk_coverage_area(errors, np.ones(4)) == pytest.approx(0.25)
    # Two surest rows tie with one error between them: errors 1/2, 1/2, then 1/3.
    assert risk_coverage_area(numbers(1, 0, 0), numbers(5, 5, 1)) == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)


def test_preferring_the_longer_response_counts_pairs_of_unequal_length_only():
    gaps = numbers(1, -1, 0, 4)
    assert prefers_longer(numbers(1, 1, 1, -1), gaps) == pytest.approx(1 / 3)
    assert prefers_longer(numbers(1, -1, 1, 0), gaps) == pytest.approx(2.5 / 3)
    assert prefers_longer(numbers(1), numbers(0)) == 0.5


def test_longer_is_better_counts_equal_lengths_one_half():
    assert longer_is_better([3, -1, 0, 2]) == pytest.approx(2.5 / 4)


def test_a_reward_for_length_alone_correlates_perfectly():
    gaps = numbers(5, -3, 100, 1)
    assert length_correlation(0.1 * gaps, gaps) == pytest.approx(1.0)
    assert length_correlation(-(gaps**3), gaps) == pytest.approx(-1.0)  # ranks, not values
    assert length_correlation(np.zeros(4), gaps) == 0.0


def test_length_correlation_does_not_ask_which_response_was_chosen():
    margins, gaps = numbers(1, 2, -3, 0.5), numbers(4, -1, 2, 2)
    flipped = numbers(1, -1, 1, -1)
    assert length_correlation(margins * flipped, gaps * flipped) == pytest.approx(length_correlation(margins, gaps))
    # By hand, one pair against one: (1, 1) and (2, -2) with their mirrors have ranks (3, 2; 4, 1) and (3, 2; 1, 4):
    # centred (.5, -.5, 1.5, -1.5) and (.5, -.5, -1.5, 1.5): (.25 + .25 - 2.25 - 2.25) / 5 = -0.8
    assert length_correlation(numbers(1, 2), numbers(1, -2)) == pytest.approx(-0.8)


def pairs(std=0.0):
    # margins 2, -1, 1; the wrong pair is the least certain by its standard deviation
    return ScoredPairs(
        chosen=numbers(2, 0, 1),
        rejected=numbers(0, 1, 0),
        margin_std=std * numbers(0.5, 2.0, 1.0),
        log_odds=numbers(1.0, -0.25, 0.5),
        length_gap=numbers(10, 5, -5),
    )


def diagnostics(std=0.0, threshold=None):
    return pair_diagnostics(pairs(std), answer_threshold=threshold)


def test_diagnostics_of_three_pairs_by_hand():
    metrics = diagnostics()
    assert metrics["mean_abs_margin"] == pytest.approx(4 / 3)
    # |margin| 2 is right; the other two tie with one error: 0, then 1/2 of 2, then 1 of 3
    assert metrics["aurc/margin"] == pytest.approx((0 + 0.25 + 1 / 3) / 3)
    assert metrics["accuracy/chosen_longer"] == 0.5
    assert metrics["accuracy/chosen_shorter"] == 1.0
    assert metrics["prefers_longer"] == pytest.approx(1 / 3)
    assert not [name for name in metrics if "std" in name or "answered" in name]


def test_the_calibrated_log_odds_have_metrics_of_their_own():
    metrics = diagnostics()
    assert metrics["nll"] == pytest.approx(sum(math.log1p(math.exp(-x)) for x in (2, -1, 1)) / 3)
    assert metrics["calibrated/nll"] == pytest.approx(sum(math.log1p(math.exp(-x)) for x in (1, -0.25, 0.5)) / 3)
    # One pair a bin: right at sigmoid(1) and sigmoid(1/2), wrong at sigmoid(1/4).
    sigmoid = [1 / (1 + math.exp(-x)) for x in (1.0, 0.5, 0.25)]
    assert metrics["ece"] == pytest.approx((1 - sigmoid[0] + 1 - sigmoid[1] + sigmoid[2]) / 3)
    assert metrics["ece_uncalibrated"] == pytest.approx(
        (1 - 1 / (1 + math.exp(-2.0)) + 2 * (1 / (1 + math.exp(-1.0)) - 0.5)) / 3  # one of the two equal ones is right
    )
    # By |log-odds| the error comes last.
    assert metrics["aurc_gain/log_odds"] == pytest.approx(1 / 3 - 1 / 9)


def test_the_calibration_error_by_chance_by_hand():
    # One bin a pair for 15 pairs of probability .8: sqrt(2/pi) sqrt(.8 * .2) = .798 * .4 in each.
    assert calibration_error_by_chance(np.full(15, math.log(4))) == pytest.approx(math.sqrt(2 / math.pi) * 0.4)
    # Four pairs a bin: half of it.
    assert calibration_error_by_chance(np.full(60, -math.log(4))) == pytest.approx(math.sqrt(2 / math.pi) * 0.2)


def test_right_probabilities_show_the_error_of_chance():
    rng = np.random.default_rng(0)
    logits = rng.normal(0.0, 1.5, (200, 450))
    first_wins = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
    errors = [calibration_error(row) for row in np.where(first_wins, logits, -logits)]
    assert calibration_error_by_chance(logits[0]) == pytest.approx(np.mean(errors), rel=0.05)


def test_answers_are_the_pairs_above_the_threshold():
    assert (diagnostics(threshold=0.3)["answered"], diagnostics(threshold=0.3)["answered_error"]) == (2 / 3, 0.0)
    assert diagnostics(threshold=0.1)["answered_error"] == pytest.approx(1 / 3)
    none = diagnostics(threshold=1.0)  # not above it
    assert none["answered"] == 0.0
    assert math.isnan(none["answered_error"])


def test_a_standard_deviation_that_knows_the_error_lowers_the_risk():
    metrics = diagnostics(std=1.0)
    assert metrics["aurc/std"] == pytest.approx((0 + 0 + 1 / 3) / 3)
    assert metrics["aurc_gain/std"] == pytest.approx(1 / 3 - 1 / 9)


def test_no_pair_with_a_shorter_chosen_response_has_no_accuracy():
    only = pairs().take(np.array([0, 0]))
    assert math.isnan(pair_diagnostics(only, answer_threshold=None)["accuracy/chosen_shorter"])


@pytest.mark.parametrize("rows", [[], [0]])
def test_columns_of_unequal_length_or_without_rows_are_refused(rows):
    with pytest.raises(ShapeError, match="must have one length, at least 1"):
        ScoredPairs(
            chosen=numbers(*rows),
            rejected=numbers(*rows, *rows),
            margin_std=numbers(*rows),
            log_odds=numbers(*rows),
            length_gap=numbers(*rows),
        )
