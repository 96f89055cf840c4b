import math

import pytest

from pipeline.errors import NumericsError
from pipeline.objectives.pac_bayes import (
    BOUNDS,
    binary_kl,
    binary_kl_inverse,
    clopper_pearson_upper,
    largest_kl,
    risk_bound,
    smallest_n,
)

N, RISK, DELTA = 60_000, 0.25, 0.05


@pytest.mark.parametrize(
    ("kl_per_pair", "mcallester99", "kl_inverse"),
    [
        (0.0, 0.268, 0.258),
        (0.001, 0.279, 0.271),
        (0.01, 0.323, 0.315),
        (0.1, 0.474, 0.467),
        (0.5, 0.750, 0.731),
        (1.0, 0.957, 0.870),
        (2.0, 1.250, 0.967),
        (10.0, 2.486, 1.000),
    ],
)
def test_the_bounds_have_the_values_of_the_spec(kl_per_pair, mcallester99, kl_inverse):
    values = {name: risk_bound(bound, RISK, kl_per_pair * N, N, DELTA) for name, bound in BOUNDS.items()}
    assert values["mcallester99"] == pytest.approx(mcallester99, abs=6e-4)
    assert values["kl_inverse"] == pytest.approx(kl_inverse, abs=6e-4)
    assert values["kl_inverse"] <= values["mcallester03"] <= values["mcallester99"]


def test_the_mcallester_bounds_by_hand():
    # n = 2, so 2n - 1 = 3; delta = 1/e, so ln 1/delta = 1.
    delta = math.exp(-1.0)
    paper = risk_bound(BOUNDS["mcallester99"], 0.25, 3.0, 2, delta)
    assert paper == pytest.approx(0.25 + math.sqrt((3.0 + 1.0 + 2.5 * math.log(2.0) + 8.0) / 3.0))
    later = risk_bound(BOUNDS["mcallester03"], 0.25, 3.0, 2, delta)
    assert later == pytest.approx(0.25 + math.sqrt((3.0 + 1.0 + math.log(2.0) + 2.0) / 3.0))


def test_the_kl_inverse_by_hand():
    # Without errors kl(0||p) = -ln(1 - p), so the bound is 1 - exp(-(D + ln(2 sqrt(n)/delta))/n).
    assert binary_kl_inverse(0.0, 0.3) == pytest.approx(1.0 - math.exp(-0.3))
    bound = risk_bound(BOUNDS["kl_inverse"], 0.0, 6.0, 4, 0.5)
    assert bound == pytest.approx(1.0 - math.exp(-(6.0 + math.log(8.0)) / 4.0))
    assert binary_kl(0.25, 0.5) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert binary_kl_inverse(0.25, binary_kl(0.25, 0.5)) == pytest.approx(0.5)
    assert binary_kl_inverse(1.0, 0.3) == 1.0
    assert binary_kl(0.3, 0.3) == 0.0


@pytest.mark.parametrize("name", sorted(BOUNDS))
@pytest.mark.parametrize("level", [0.5, 1.0])
def test_a_bound_reaches_the_level_exactly_at_its_largest_kl(name, level):
    kl = largest_kl(BOUNDS[name], RISK, N, DELTA, level=level)
    if (name, level) == ("kl_inverse", 1.0):
        assert kl == math.inf
    else:
        assert risk_bound(BOUNDS[name], RISK, kl, N, DELTA) == pytest.approx(level)


def test_no_divergence_is_small_enough_for_a_ranker_that_errs_as_often_as_a_coin():
    assert largest_kl(BOUNDS["mcallester99"], 0.5, N, DELTA, level=0.5) == -math.inf
    assert smallest_n(BOUNDS["mcallester99"], 0.5, 0.0, DELTA, level=0.5) is None


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_one_pair_fewer_than_the_smallest_n_is_not_enough(name):
    n = smallest_n(BOUNDS[name], RISK, 0.1, DELTA, level=0.5)
    assert risk_bound(BOUNDS[name], RISK, 0.1 * n, n, DELTA) < 0.5
    assert risk_bound(BOUNDS[name], RISK, 0.1 * (n - 1), n - 1, DELTA) >= 0.5


def test_no_number_of_pairs_makes_up_for_a_divergence_that_grows_with_them():
    # The limit is 2 (1 - R_hat)^2 = 1.125 nats a pair.
    assert smallest_n(BOUNDS["mcallester99"], RISK, 1.12, DELTA, level=1.0) is not None
    assert smallest_n(BOUNDS["mcallester99"], RISK, 1.13, DELTA, level=1.0) is None


def test_clopper_pearson_has_the_value_of_the_spec():
    assert clopper_pearson_upper(500, 1964, 0.05) == pytest.approx(0.2713, abs=5e-5)


def test_clopper_pearson_at_its_ends():
    # Without errors (1 - p)^n = delta; with one pair right of two, 1 - p^2 = delta.
    assert clopper_pearson_upper(0, 10, 0.05) == pytest.approx(1.0 - 0.05**0.1)
    assert clopper_pearson_upper(1, 2, 0.05) == pytest.approx(math.sqrt(0.95))
    assert clopper_pearson_upper(10, 10, 0.05) == 1.0


@pytest.mark.parametrize(("errors", "n"), [(1, 7), (3, 40), (15_000, 60_000), (59_999, 60_000)])
def test_clopper_pearson_equals_scipys(errors, n):
    stats = pytest.importorskip("scipy.stats", reason="needs scipy")
    expected = stats.binomtest(errors, n, alternative="less").proportion_ci(0.95, method="exact").high
    assert clopper_pearson_upper(errors, n, 0.05) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "letter"),
    [
        ((1.2, 1.0, 10, 0.05), r"empirical risk = 1.2 must be in \[0, 1\]"),
        ((0.2, math.nan, 10, 0.05), r"D\(Q\|\|P\) = nan must be finite"),
        ((0.2, -1.0, 10, 0.05), r"D\(Q\|\|P\) = -1.0 must be finite and not negative"),
        ((0.2, 1.0, 0, 0.05), r"number of pairs = 0 must be at least 1"),
        ((0.2, 1.0, 10, 5), r"delta = 5 must be between 0 and 1"),
    ],
)
def test_a_bound_of_impossible_numbers_is_refused(arguments, letter):
    with pytest.raises(NumericsError, match=letter):
        risk_bound(BOUNDS["mcallester99"], *arguments)


def test_more_errors_than_pairs_are_refused():
    with pytest.raises(NumericsError, match="errors among 10 pairs = 11 must be between 0 and 10"):
        clopper_pearson_upper(11, 10, 0.05)
