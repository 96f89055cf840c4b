import json
import math
from dataclasses import asdict

import pytest

from pipeline.errors import DataError
from pipeline.evaluation.pac_bayes_report import pac_bayes_report, pac_bayes_text
from pipeline.evaluation.posterior_risk import PosteriorRisk


def risk(num_pairs=60_000, num_prompts=None, gibbs_risk=0.25, kl_per_pair=0.0, errors=0):
    """D is split 1 : 2 : 5 over w and the two z."""
    kl = kl_per_pair * num_pairs
    return PosteriorRisk(
        num_pairs=num_pairs,
        num_prompts=num_prompts or num_pairs,
        fingerprint="0",
        samples=8,
        gibbs_risk=gibbs_risk,
        gibbs_risk_standard_error=0.001,
        first_draw_errors=errors + 10,
        mean_reward_errors=errors,
        kl_w=kl / 8,
        kl_z_chosen=kl / 4,
        kl_z_rejected=kl * 5 / 8,
    )


HELDOUT = risk(num_pairs=1964, errors=500)


def report(training, heldout=HELDOUT, shared_prompts=0):
    return pac_bayes_report(training, heldout, delta=0.05, shared_prompts=shared_prompts)


def test_the_divergence_is_a_total_of_three_parts():
    made = report(risk(kl_per_pair=10.0))
    assert made.kl == pytest.approx(600_000.0)
    assert made.kl_per_pair == pytest.approx(10.0)
    assert "600,000.0 nats = 10 per pair: w 1.25, z chosen 2.5, z rejected 6.25" in pac_bayes_text(made)


def test_a_useful_posterior_has_a_vacuous_bound_and_the_text_says_why():
    made = report(risk(kl_per_pair=10.0))
    paper = made.bounds["mcallester99"]
    assert paper.at_most == pytest.approx(2.486, abs=1e-3)
    assert (paper.clipped, paper.vacuous, paper.beats_coin) == (1.0, True, False)
    assert (paper.pairs_below_1, paper.pairs_below_coin) == (None, None)
    text = pac_bayes_text(made)
    assert "vacuous: it promises a risk of at most 2.49, and every risk is at most 1" in text
    assert "falls below 1 where D/n is below 1.1243 nats" in text
    assert "at 10 nats per pair no number of pairs brings the bound below 1" in text
    assert "No value of these bounds would be a certificate" in text


def test_between_1_and_a_coin_the_bound_is_not_vacuous_and_says_nothing():
    made = report(risk(kl_per_pair=0.5))
    paper = made.bounds["mcallester99"]
    assert (paper.vacuous, paper.beats_coin) == (False, False)
    text = pac_bayes_text(made)
    assert "of 0.7503 promises no more than a coin, whose risk is 1/2. At this n and R_hat it falls below 1/2" in text
    assert "no number of pairs brings the bound below 1/2" in text


def test_a_small_sample_says_how_many_pairs_it_takes():
    made = report(risk(num_pairs=500, kl_per_pair=0.1))
    # At D/n = 0.1 and R_hat = 1/4, 1147 pairs bring Eq. 19 below 1/2: the smallest n with
    # 1/16 * (2n - 1) > 0.1 n + ln 20 + 5/2 ln n + 8.
    assert 1147 * 0.025 - 1 / 16 > math.log(20) + 2.5 * math.log(1147) + 8 > 1146 * 0.025 - 1 / 16
    assert made.bounds["mcallester99"].pairs_below_coin == 1147
    assert "it takes 1,147 pairs to bring the bound below 1/2" in pac_bayes_text(made)


def test_a_bound_below_a_coin_is_called_so_and_still_no_certificate():
    text = pac_bayes_text(report(risk(kl_per_pair=0.01)))
    assert "of 0.3229 is below a coin's risk of 1/2" in text
    assert "vacuous" not in text
    assert "No value of these bounds would be a certificate" in text


def test_a_coin_needs_more_than_a_small_divergence():
    made = report(risk(gibbs_risk=0.5))
    assert made.bounds["mcallester99"].kl_per_pair_below_coin == 0.0
    assert "not even D = 0 would bring it below 1/2" in pac_bayes_text(made)


def test_kl_inverse_never_passes_1():
    made = report(risk(kl_per_pair=100.0))
    bound = made.bounds["kl_inverse"]
    assert bound.at_most == 1.0
    assert bound.vacuous
    assert bound.kl_per_pair_below_1 is None
    assert "kl_inverse approaches 1 and never exceeds it" in pac_bayes_text(made)


def test_the_certificate_has_the_value_of_the_spec():
    made = report(risk(kl_per_pair=10.0))
    assert made.heldout_mean_reward_at_most == pytest.approx(0.2713, abs=5e-5)
    assert made.heldout_gibbs_at_most > made.heldout_mean_reward_at_most
    assert "the mean reward misorders at most 27.1% of pairs like these, at confidence 0.95" in pac_bayes_text(made)


def test_a_heldout_prompt_in_training_takes_the_certificate_back():
    text = pac_bayes_text(report(risk(), shared_prompts=3))
    assert "no certificate either: some held-out prompts (3) are also in training" in text
    assert "What holds" not in text


def test_training_pairs_that_share_prompts_are_told():
    text = pac_bayes_text(report(risk(num_prompts=2_400)))
    assert "60,000 pairs share 2,400 prompts" in text


def test_heldout_pairs_that_share_prompts_are_refused():
    with pytest.raises(DataError, match=r"100 held-out pairs share 60 prompts.* Keep one pair per prompt"):
        report(risk(), heldout=risk(num_pairs=100, num_prompts=60))


@pytest.mark.parametrize("kl_per_pair", [0.0, 0.1, 100.0])
def test_the_report_is_plain_json(kl_per_pair):
    written = json.dumps(asdict(report(risk(kl_per_pair=kl_per_pair))), allow_nan=False)
    assert json.loads(written)["bounds"]["mcallester03"]["at_most"] > 0.25
