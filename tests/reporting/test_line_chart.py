import math

import pytest

from pipeline.reporting.charts import DIRECT_CHARTS, POLICY_CHARTS, REWARD_CHARTS
from pipeline.reporting.line_chart import Chart, Series, Whisker, draw_charts, smoothed, smoothing_window, ticks

CHART = Chart(title="kl", first=Series("kl", "training"), second=Series("eval/kl", "held out"), healthy="Low.")


def drawn(rows):
    [only] = draw_charts([CHART], rows)
    return only


def labels(low, high, **options):
    return [label for _, label in ticks(low, high, **options)]


def test_a_smooth_curve_is_the_mean_of_its_neighbours_and_of_as_many_on_both_sides_near_an_end():
    assert smoothed([0.0, 3.0, 6.0, 0.0, 3.0], 3) == [0.0, 3.0, 3.0, 3.0, 3.0]
    assert smoothed([1.0, 2.0, 9.0, 2.0, 1.0], 5) == [1.0, 4.0, 3.0, 4.0, 1.0]


@pytest.mark.parametrize(("points", "window"), [(1, 1), (11, 1), (12, 3), (60, 7), (1000, 101)])
def test_about_a_tenth_of_the_points_are_smoothed_over_and_few_points_are_not(points, window):
    assert smoothing_window(points) == window


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (1, 2, ["1", "2"]),
        (1, 5, ["1", "2", "3", "4", "5"]),
        (1, 12, ["5", "10"]),
        (1, 60, ["20", "40", "60"]),
        (1, 2400, ["500", "1,000", "1,500", "2,000"]),
    ],
)
def test_steps_are_whole_numbers(first, last, expected):
    assert labels(first, last, most=5, whole=True) == expected


def test_the_axis_of_steps_never_shows_a_fraction_or_more_than_six_numbers():
    for last in range(2, 400):
        marks = ticks(1, last, most=5, whole=True)
        assert 1 <= len(marks) <= 6
        assert all(place == int(place) and 1 <= place <= last for place, _ in marks)


def test_values_have_round_labels_with_as_many_decimals_as_they_need():
    assert labels(0.52, 0.81, most=4) == ["0.6", "0.7", "0.8"]
    assert labels(-0.3, 1.2, most=4) == ["0.0", "0.5", "1.0"]
    assert labels(0.0, 1e-5, most=4) == ["0", "5e-06", "1e-05"]
    assert labels(0.0, 1000.0, most=4) == ["0", "500", "1,000"]
    assert labels(0.0, 8.0, most=4) == ["0", "2", "4", "6", "8"]


def test_long_curves_are_drawn_thin_and_smooth_short_ones_as_they_are():
    rows = [{"step": i, "kl": float(i % 2)} for i in range(40)] + [{"step": 39, "eval/kl": 0.5}]
    training, held_out = drawn(rows).series
    assert (len(training.raw), len(training.smooth)) == (40, 40)
    assert training.legend == "training: 1 at step 40 (thick: mean of 5 steps)"
    assert (len(held_out.raw), list(held_out.smooth)) == (1, [])
    assert (training.place, held_out.place) == ("first", "second")


def test_intervals_stand_around_their_points():
    rows = [{"step": 0, "kl": 0.0}, {"step": 1, "eval/kl": 0.5, "eval/kl_low": 0.0, "eval/kl_high": 1.0}]
    held_out = drawn(rows).series[1]
    # The axis has 5% of room on both sides of 0 to 1: 158 units for 1.1.
    assert held_out.whiskers == [Whisker(332.0, round(8 + 158 * 1.05 / 1.1, 1), round(8 + 158 * 0.05 / 1.1, 1))]
    assert held_out.raw[0] == (332.0, 87.0)


def test_a_chart_without_numbers_is_left_out_and_what_is_not_finite_is_no_point():
    assert draw_charts([CHART], [{"step": 0, "reward": 1.0}]) == []
    [training] = drawn([{"step": 0, "kl": 1.0}, {"step": 1, "kl": math.nan}, {"step": 2, "kl": math.inf}]).series
    assert len(training.raw) == 1


def test_a_step_with_two_rows_is_one_point():
    [training] = drawn([{"step": 0, "kl": 1.0}, {"step": 1, "kl": 2.0}, {"step": 1, "kl": 3.0}]).series
    assert training.legend == "training: 3 at step 2"
    assert len(training.raw) == 2


@pytest.mark.parametrize("chart", [*REWARD_CHARTS, *POLICY_CHARTS, *DIRECT_CHARTS], ids=lambda chart: chart.title)
def test_every_chart_says_what_is_healthy(chart):
    assert chart.healthy.endswith(".")
    assert chart.first or chart.second
