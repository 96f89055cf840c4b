"""Bradley-Terry win rates against closed forms and the public leaderboard."""

import csv
import math

import numpy as np
import pytest

from pipeline.benchmark.arena_hard.battles import to_battles
from pipeline.benchmark.arena_hard.win_rates import bradley_terry_win_rates, fit_logistic
from pipeline.errors import DataError
from tests.benchmark.arena_hard.battle_rows import SHARED, battle, judged, needs_public_data, public_battles


def test_golden_games_have_their_rates():
    # (B>>A, A>B) is four rows of 1; (A=B, B>A) is one of 0.5 and one of 0.
    battles = to_battles([judged("B>>A", "A>B", "x"), judged("A=B", "B>A", "y")], "v2")
    rates = bradley_terry_win_rates(battles, "base", num_resamples=2)
    assert rates["x"]["win_rate"] == pytest.approx(100, abs=1e-3)
    assert rates["y"]["win_rate"] == pytest.approx(25, abs=1e-3)
    assert (rates["x"]["battles"], rates["y"]["battles"]) == (4, 2)


def test_against_one_baseline_bradley_terry_is_the_weighted_mean():
    rng = np.random.default_rng(0)
    outcomes, weights = rng.choice([0.0, 0.5, 1.0], 200), rng.choice([1, 3], 200)
    models = rng.choice(["x", "y"], 200)
    battles = [battle(y, model_b=m, weight=int(w)) for y, w, m in zip(outcomes, weights, models, strict=True)]
    rates = bradley_terry_win_rates(battles, "base", num_resamples=2)
    for model in ("x", "y"):
        mine = models == model
        mean = np.average(1 - outcomes[mine], weights=weights[mine])
        assert rates[model]["win_rate"] == pytest.approx(100 * mean, abs=1e-5)


def test_strength_passes_through_a_chain_of_battles():
    # x beats base 2:1, y beats x 3:1; so y's odds against base are 6 to 1.
    battles = [battle(0.0, weight=2, model_b="x"), battle(1.0, model_b="x")]
    battles += [battle(1.0, "y", "x", weight=3), battle(0.0, "y", "x")]
    rates = bradley_terry_win_rates(battles, "base", num_resamples=2)
    assert rates["x"]["win_rate"] == pytest.approx(100 * 2 / 3, abs=1e-4)
    assert rates["y"]["win_rate"] == pytest.approx(100 * 6 / 7, abs=1e-4)


def test_weights_are_repeated_rows():
    weighted = bradley_terry_win_rates([battle(0.0, weight=3), battle(1.0, weight=1)], "base", num_resamples=2)
    repeated = bradley_terry_win_rates([battle(0.0)] * 3 + [battle(1.0)], "base", num_resamples=2)
    assert weighted["m"]["win_rate"] == pytest.approx(repeated["m"]["win_rate"])


def test_the_interval_is_the_bootstraps_of_a_binomial():
    # 400 questions with one battle each, half of them won: sd = 100 sqrt(.25 / 400) = 2.5 points.
    battles = [battle(float(n % 2), question_id=str(n)) for n in range(400)]
    metrics = bradley_terry_win_rates(battles, "base", seed=1)["m"]
    for name, expected in (("low", 50 - 1.96 * 2.5), ("high", 50 + 1.96 * 2.5)):
        assert metrics[name] == pytest.approx(expected, abs=0.6)
        assert metrics[f"upstream_{name}"] == pytest.approx(expected, abs=0.6)


def test_three_copies_of_a_battle_narrow_only_the_upstream_interval():
    once = [battle(float(n % 2), question_id=str(n)) for n in range(400)]
    thrice = [battle(b.outcome, question_id=b.question_id, weight=3) for b in once]
    one, three = (bradley_terry_win_rates(battles, "base", seed=1)["m"] for battles in (once, thrice))
    assert three["high"] - three["low"] == pytest.approx(one["high"] - one["low"])
    ratio = (three["upstream_high"] - three["upstream_low"]) / (one["upstream_high"] - one["upstream_low"])
    assert ratio == pytest.approx(1 / math.sqrt(3), abs=0.06)


def test_a_seed_gives_its_interval_again():
    battles = [battle(float(n % 3 == 0), question_id=str(n)) for n in range(30)]
    first, again, other = (bradley_terry_win_rates(battles, "base", seed=s, num_resamples=20) for s in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("battles", "letter"),
    [
        ([], "0 battles do not compare any model with the baseline 'base'"),
        ([battle(1.0, "x", "y")], "do not compare x, y with the baseline 'base'"),
        ([battle(1.0), battle(1.0, "x", "y")], "do not compare x, y with"),
    ],
)
def test_models_that_never_met_the_baseline_are_named(battles, letter):
    with pytest.raises(DataError, match=letter):
        bradley_terry_win_rates(battles, "base")


def leaderboard(name):
    with (SHARED / name).open() as file:
        return {row["model"]: row for row in csv.DictReader(file)}


@needs_public_data
@pytest.mark.parametrize(
    ("battles", "board", "num_models"),
    [
        ("battles_official_models_gpt4-1106-judge.jsonl", "arena_hard_leaderboard_20240731.csv", 2),
        ("battles_wetzel_20240813.parquet", "leaderboard_wetzel_20240813.csv", 9),
    ],
)
def test_public_battles_give_their_leaderboard(battles, board, num_models):
    rates, published = (
        bradley_terry_win_rates(public_battles(battles), "gpt-4-0314", num_resamples=300),
        leaderboard(board),
    )
    assert len(rates) == num_models
    for model, metrics in rates.items():
        assert metrics["win_rate"] == pytest.approx(float(published[model]["score"]), abs=0.01)
        assert metrics["upstream_low"] == pytest.approx(float(published[model]["rating_q025"]), abs=0.8)
        assert metrics["upstream_high"] == pytest.approx(float(published[model]["rating_q975"]), abs=0.8)
        wider = (metrics["high"] - metrics["low"]) / (metrics["upstream_high"] - metrics["upstream_low"])
        assert 1.2 < wider < 2.3


def test_the_fit_solves_its_normal_equation():
    # One feature of value 1: sigmoid(theta) = mean, up to the ridge; here 3 (p - 3/4) weights + ridge theta = 0.
    [theta] = fit_logistic(np.ones((2, 1)), np.array([1.0, 0.5]), np.array([2.0, 2.0]), ridge=0.5)
    p = 1 / (1 + math.exp(-theta))
    assert 4 * (p - 0.75) + 0.5 * theta == pytest.approx(0, abs=1e-7)


def test_the_baseline_against_itself_alone_is_refused():
    battles = [battle(0.5, model_b="base"), battle(1.0, model_b="base")]
    with pytest.raises(DataError, match="all 2 battles compare the baseline 'base' with itself"):
        bradley_terry_win_rates(battles, "base", num_resamples=2)
    rates = bradley_terry_win_rates([*battles, battle(0.0), battle(1.0)], "base", num_resamples=2)
    assert rates["m"]["win_rate"] == pytest.approx(50.0, abs=1e-4)
