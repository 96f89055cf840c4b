"""Pearson's correlation by hand."""

import math

import numpy as np
import pytest

from pipeline.evaluation.correlation import correlation_or_zero, pearson_correlation


def test_the_correlation_by_hand():
    # Deviations (-1, 0, 1) and (-1, 1, 0): 1 / (sqrt 2 * sqrt 2).
    assert pearson_correlation([1.0, 2.0, 3.0], [0.0, 2.0, 1.0]) == pytest.approx(0.5)


def test_scale_and_offset_do_not_matter_and_the_sign_does():
    values = np.array([0.1, 0.7, 0.2])
    assert pearson_correlation(0.5 + 0.1 * values, values) == pytest.approx(1.0)
    assert pearson_correlation(-values, values) == pytest.approx(-1.0)


@pytest.mark.parametrize("x", [[], [1.0], [2.0, 2.0, 2.0]])
def test_without_variation_there_is_no_correlation(x):
    assert math.isnan(pearson_correlation(x, list(range(len(x)))))
    assert correlation_or_zero(x, list(range(len(x)))) == 0.0
