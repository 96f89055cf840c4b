"""Bootstrap intervals against what theory says they are."""

import math

import numpy as np
import pytest

from pipeline.errors import ShapeError
from pipeline.evaluation.bootstrap import bootstrap_intervals, difference_of_statistics


def mean_of(values):
    return lambda rows: {"mean": float(np.asarray(values)[rows].mean())}


def test_the_interval_of_a_mean_is_about_two_standard_errors_wide():
    right = [1.0] * 700 + [0.0] * 300
    low, high = bootstrap_intervals(mean_of(right), range(1000), seed=0)["mean"]
    error = math.sqrt(0.7 * 0.3 / 1000)
    assert low == pytest.approx(0.7 - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(0.7 + 1.96 * error, abs=0.2 * error)


def test_repeating_every_row_of_a_prompt_makes_nothing_surer():
    right = [1.0] * 70 + [0.0] * 30
    once = bootstrap_intervals(mean_of(right), range(100), seed=0)["mean"]
    prompts = [n for n in range(100) for _ in range(5)]
    five_times = bootstrap_intervals(mean_of(np.repeat(right, 5)), prompts, seed=0)["mean"]
    assert five_times == pytest.approx(once)
    as_if_independent = bootstrap_intervals(mean_of(np.repeat(right, 5)), range(500), seed=0)["mean"]
    assert as_if_independent[1] - as_if_independent[0] < 0.6 * (once[1] - once[0])


def test_groups_of_any_size_and_order_are_drawn_whole():
    groups = ["a", "b", "a", "c", "a"]
    seen = []
    bootstrap_intervals(lambda rows: seen.append(sorted(rows.tolist())) or {"x": 0.0}, groups, seed=1, draws=50)
    for rows in seen[:50]:
        assert rows.count(0) == rows.count(2) == rows.count(4)
    assert {len(rows) for rows in seen} <= {3, 5, 7, 9}  # three draws of 3, 1 or 1 rows
    assert len({tuple(rows) for rows in seen}) > 5


def test_the_same_seed_gives_the_same_interval():
    values = [0.1, 0.5, 0.9, 0.3]
    again = [bootstrap_intervals(mean_of(values), range(4), seed=seed, draws=40) for seed in (3, 3, 4)]
    assert again[0] == again[1] != again[2]


def test_two_models_that_err_on_the_same_rows_are_told_apart():
    """The paired interval excludes 0 where the two separate intervals overlap widely."""
    theirs = [1.0] * 600 + [0.0] * 400
    ours = [1.0] * 630 + [0.0] * 370
    separate = [bootstrap_intervals(mean_of(v), range(1000), seed=0)["mean"] for v in (theirs, ours)]
    assert separate[0][1] > separate[1][0]
    low, high = bootstrap_intervals(difference_of_statistics(mean_of(ours), mean_of(theirs)), range(1000), seed=0)[
        "mean"
    ]
    assert 0.015 < low < 0.03 < high < 0.045


def test_a_metric_that_some_draws_lack_has_the_interval_of_the_others():
    def statistic(rows):
        return {"n": float(len(rows))} | ({"first": 7.0} if 0 in rows else {})

    assert bootstrap_intervals(statistic, range(3), seed=0, draws=60) == {"n": (3.0, 3.0), "first": (7.0, 7.0)}
    nowhere = bootstrap_intervals(lambda rows: {"x": float("nan")}, range(3), seed=0, draws=5)["x"]
    assert all(math.isnan(end) for end in nowhere)


def test_one_prompt_gives_no_interval():
    low, high = bootstrap_intervals(mean_of([0.0, 1.0]), ["p", "p"], seed=0)["mean"]
    assert math.isnan(low)
    assert math.isnan(high)


def test_a_bootstrap_of_nothing_is_refused():
    with pytest.raises(ShapeError, match="no rows"):
        bootstrap_intervals(mean_of([]), [], seed=0)
