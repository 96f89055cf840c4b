"""Rules about the text of a response."""

import pyarrow.parquet as pq
import pytest

from pipeline.config.rewards import ExactMatch, FormatReward, LengthReward, MathAnswer, RegexMatch
from pipeline.rewards.built_in import ExactMatchReward, FormatRule, LengthRule, RegexReward
from pipeline.rewards.function_calls import LoadedFunction
from pipeline.rewards.function_spec import math_spec
from tests.rewards.rows import means, rows_of
from tests.support.paths import SHARED_DATA, needs_public_data


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, [1.0, 0.0, 0.0]), ({"ignore_case": True}, [1.0, 1.0, 0.0]), ({"after": "="}, [1.0, 0.0, 1.0])],
)
def test_a_match_is_exact_but_for_space_case_and_what_stands_before_the_marker(settings, expected):
    rows = rows_of(" Paris\n", "paris", "2 + 1 = Paris", answer=["Paris"] * 3)
    assert means(ExactMatchReward(ExactMatch(**settings)).score(rows)) == expected


def test_a_pattern_is_found_anywhere_or_its_last_match_holds_the_column():
    rows = rows_of("so (a), no (b)", "(b) or (a)", "none", answer=["b", "b", "b"])
    assert means(RegexReward(RegexMatch(pattern=r"\((\w)\)")).score(rows)) == [1.0, 1.0, 0.0]
    assert means(RegexReward(RegexMatch(pattern=r"\((\w)\)", column="answer")).score(rows)) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target": 4}, [-0.5, 0.0, -0.5]),
        ({"at_most": 4}, [0.0, 0.0, -0.5]),
        ({"at_most": 2, "unit": "words"}, [0.0, -1.0, -2.0]),
    ],
)
def test_a_length_costs_its_relative_distance(settings, expected):
    rows = rows_of("a b", "a b c d", "a b c d e f")
    assert means(LengthRule(LengthReward(**settings)).score(rows)) == expected


def test_a_format_has_each_part_once_and_in_order():
    rows = rows_of("<t>x</t>y", "</t>x<t>", "<t>x</t><t>", "<t>x")
    assert means(FormatRule(FormatReward(parts=("<t>", "</t>"))).score(rows)) == [1.0, 0.0, 0.0, 0.0]


def test_an_expression_is_compared_by_its_value():
    pytest.importorskip("math_verify")
    responses = [r"So \boxed{\frac{1}{2}}", "the answer is 0.5", "1/3", "no idea"]
    rows = rows_of(*responses, answer=["first 2 of 4\n#### 1/2"] * 4)
    function = LoadedFunction(math_spec("math", MathAnswer(after="####")))
    assert means(function.score(rows)) == [1.0, 1.0, 0.0, 0.0]


@needs_public_data
def test_solutions_of_gsm8k_are_judged_as_their_labels_say():
    """Of all 3,620 solutions of the file every one is."""
    pytest.importorskip("math_verify")
    table = pq.read_table(SHARED_DATA / "gsm8k_solutions" / "example_model_solutions.parquet").slice(0, 30).to_pylist()
    solved = [(row["ground_truth"], row[m]) for row in table for m in ("6b_finetuning", "175b_verification")]
    rows = rows_of(*(solution["solution"] for _, solution in solved), ground_truth=[truth for truth, _ in solved])
    function = LoadedFunction(math_spec("math", MathAnswer(column="ground_truth", after="A:")))
    assert means(function.score(rows)) == [float(solution["is_correct"]) for _, solution in solved]
