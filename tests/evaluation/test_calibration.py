"""Temperature, variance factor and the threshold of an answer, on pairs whose truth is known."""

import math

import numpy as np
import pytest

from pipeline.evaluation.calibration import answer_threshold, fit_scale, log_odds, split_heldout
from pipeline.records import PromptGroup


def simulated_margins(log_odds_, scale, seed):
    """Margins of the chosen response, whose label was drawn with these log-odds: the model is off by a factor."""
    rng = np.random.default_rng(seed)
    first_wins = rng.random(len(log_odds_)) < 1 / (1 + np.exp(-log_odds_))
    return scale * np.where(first_wins, log_odds_, -log_odds_)


def test_log_odds_by_hand():
    # T = 3 and pi/8 * 128/pi = 16: the margin is divided by 5.
    assert log_odds(np.array([10.0]), np.array([128 / math.pi]), 3.0) == pytest.approx([2.0])
    assert log_odds(np.array([10.0]), np.array([0.0]), 2.0) == pytest.approx([5.0])


def test_log_odds_approximate_the_integral_over_a_gaussian_margin():
    x, w = np.polynomial.hermite_e.hermegauss(60)
    exact = (w / (1.0 + np.exp(-(2.0 + 2.0 * x)))).sum() / w.sum()
    [logit] = log_odds(np.array([2.0]), np.array([4.0]), 1.0)
    assert 1 / (1 + math.exp(-logit)) == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_of_simulated_labels_is_found(temperature):
    true = np.random.default_rng(0).normal(0.0, 2.0, 20_000)
    margins = simulated_margins(true, temperature, seed=1)
    fit = fit_scale(margins, np.zeros_like(margins))
    assert fit.temperature == pytest.approx(temperature, rel=0.05)
    assert fit.variance_factor == 1.0


def test_few_pairs_do_not_make_the_model_certain():
    """Thirty pairs that happen to be ordered right once gave temperatures near 0, and probabilities near 1."""
    rng = np.random.default_rng(0)
    fresh = simulated_margins(rng.normal(0.0, 2.0, 20_000), 1.0, seed=1)
    unsure = rng.lognormal(0.0, 1.0, 20_000)  # says nothing of the errors

    def nll(logits):
        return np.logaddexp(0.0, -logits).mean()

    fitted = []
    for start in range(0, 600, 30):
        rows = slice(start, start + 30)
        fit = fit_scale(fresh[rows], unsure[rows])
        fitted.append(nll(log_odds(fresh, fit.variance_factor * unsure, fit.temperature)))
    assert np.mean(fitted) < nll(fresh) + 0.035
    assert max(fitted) < nll(fresh) + 0.15


def test_variances_that_say_which_margins_are_noise_are_scaled_up():
    """True log-odds are what MacKay's formula makes of margins whose variance is known up to the factor 9."""
    rng = np.random.default_rng(0)
    true = rng.normal(0.0, 2.0, 40_000)
    variances = rng.choice([0.01, 4.0], 40_000)
    stretched = np.sqrt(1.0 + math.pi / 8 * 9.0 * variances)
    margins = stretched * simulated_margins(true, 1.0, seed=1)
    fit = fit_scale(margins, variances)
    assert fit.temperature == pytest.approx(1.0, rel=0.1)
    assert fit.variance_factor == pytest.approx(9.0, rel=0.15)


def test_the_threshold_of_literal_log_odds():
    # The most confident 80 of 100 are right, the others wrong. 80 right answers of 80 bound the error at level 1/100
    # by 1 - 0.01^(1/80) = 5.6%; of 90, with 10 errors, by more than 10%.
    logits = np.concatenate([np.linspace(10.0, 2.0, 80), -np.linspace(1.9, 1.0, 20)])
    assert answer_threshold(logits, error=0.1, delta=0.1) == pytest.approx(1.9)
    assert answer_threshold(logits, error=0.5, delta=0.1) == 0.0
    # Of 20 right answers nobody can say that at most 10% will be wrong: 1 - 0.01^(1/20) = 20.6%.
    assert answer_threshold(logits[:20], error=0.1, delta=0.1) is None
    assert answer_threshold(-logits, error=0.1, delta=0.1) is None


def test_a_tie_with_the_next_pair_is_not_answered():
    logits = np.array([3.0] * 50 + [1.0] * 50)
    # All are right, so all are answered. With the second half wrong, its confidence is the threshold.
    assert answer_threshold(logits, error=0.1, delta=0.1) == 0.0
    logits[50:] = -1.0
    assert answer_threshold(logits, error=0.1, delta=0.1) == 1.0


def test_answers_keep_the_promised_error_in_at_least_the_promised_share_of_samples():
    """P( wrong | answered ) > 10% for at most 10% of calibration samples, with errors at sigmoid(|l|)."""
    rng = np.random.default_rng(0)
    truth = np.abs(rng.normal(0.0, 2.5, 200_000))
    error_of = 1 / (1 + np.exp(truth))
    broken, answered = 0, []
    for _ in range(300):
        sample = np.abs(rng.normal(0.0, 2.5, 400))
        wrong = rng.random(400) < 1 / (1 + np.exp(sample))
        threshold = answer_threshold(np.where(wrong, -sample, sample), error=0.1, delta=0.1)
        if threshold is not None:
            kept = truth > threshold
            broken += error_of[kept].mean() > 0.1
            answered.append(kept.mean())
    assert broken <= 30
    assert np.mean(answered) > 0.4  # and it answers


def test_no_prompt_is_in_two_parts_and_every_pair_in_one():
    pairs = [PromptGroup(prompt_ids=(n // 3,), response_ids=((1,), (n,))) for n in range(900)]
    split = split_heldout(pairs)
    assert sorted(np.concatenate(split)) == list(range(900))
    prompts = [{int(row) // 3 for row in part} for part in split]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 300
    assert [len(part) / 900 for part in split] == pytest.approx([0.25, 0.25, 0.5], abs=0.08)
