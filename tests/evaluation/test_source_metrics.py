"""The metrics of each source, and the table that they make."""

import math

import numpy as np
import pytest

from pipeline.evaluation.source_metrics import source_metrics, source_results


def test_the_metrics_of_each_source_by_hand():
    margins, gaps = np.array([1.0, -1.0, 0.0, 2.0]), np.array([3, -1, 0, 5])
    metrics = source_metrics(margins, gaps, [0, 1, 2, 3], ["a", "b", "a", "b"])
    assert metrics["eval/source/a/pairs"] == metrics["eval/source/b/pairs"] == 2.0
    assert (metrics["eval/source/a/accuracy"], metrics["eval/source/b/accuracy"]) == (0.5, 0.5)  # a tie is an error
    assert metrics["eval/source/a/nll"] == pytest.approx((math.log1p(math.exp(-1)) + math.log(2)) / 2)
    assert metrics["eval/source/a/longer_is_better"] == 0.75  # equal lengths count one half
    assert metrics["eval/source/b/longer_is_better"] == 0.5
    first, second = source_results(metrics)
    assert (first.name, first.pairs, first.accuracy, first.accuracy_interval) == ("a", 2, 0.5, (0.0, 1.0))
    assert second.nll_interval == pytest.approx((math.log1p(math.exp(-2)), math.log1p(math.exp(1))))


def test_the_interval_draws_prompts_and_one_prompt_has_none():
    margins = np.array([1.0, 1.0, -1.0, -1.0])
    metrics = source_metrics(margins, margins, [7, 7, 7, 7], ["a"] * 4)
    [result] = source_results(metrics)
    assert (result.accuracy, result.accuracy_interval, result.nll_interval) == (0.5, (), ())
