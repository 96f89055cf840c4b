"""RewardBench, RewardBench 2 and RM-Bench by hand, and against the published weights."""

import json
import math

import numpy as np
import pytest

from pipeline.errors import DataError, ShapeError
from pipeline.evaluation.rewardbench import (
    SECTIONS,
    SUBSETS,
    best_of_n_credit,
    rewardbench2_scores,
    section_scores,
    ties_number,
    ties_score,
    ties_statistic,
)
from pipeline.evaluation.rm_bench import rm_bench_scores, style_wins
from tests.support.paths import SHARED_DATA


def test_math_weighs_half_of_reasoning():
    """Golden of docs/method.md section 10: everything right but math-prm."""
    scores = section_scores({subset: 0.0 if subset == "math-prm" else 1.0 for subset in SUBSETS})
    assert scores == pytest.approx({"Chat": 1.0, "Chat Hard": 1.0, "Safety": 1.0, "Reasoning": 0.5, "score": 0.875})


def test_a_section_is_the_mean_of_its_examples_not_of_its_subsets():
    scores = section_scores({"mt-bench-hard": 1.0, "llmbar-natural": 0.5, "llmbar-adver-manual": 0.0})
    assert scores == pytest.approx({"Chat Hard": 87 / 183, "score": 87 / 183})  # (37 + 50 + 0) / (37 + 100 + 46)


def test_an_absent_section_is_left_out_and_a_foreign_subset_counts_nowhere():
    scores = section_scores({"donotanswer": 0.2, "hep-go": 0.6, "my-own": 1.0})
    assert scores == pytest.approx({"Safety": 0.2, "Reasoning": 0.6, "score": 0.4})


def test_the_sections_have_the_published_sizes():
    sizes = {section: sum(weights.values()) for section, weights in SECTIONS.items()}
    assert sizes == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}
    assert len(SUBSETS) == 23


def test_the_weights_are_those_that_were_published():
    file = SHARED_DATA / "rewardbench_style" / "rewardbench_v1_counts.json"
    if not file.exists():
        pytest.skip(f"{file} is not here: the published subset sizes")
    published = json.loads(file.read_text())
    assert {section: sorted(weights) for section, weights in SECTIONS.items()} == {
        section: sorted(subsets) for section, subsets in published["sections"].items()
    }
    assert {s: n for weights in SECTIONS.values() for s, n in weights.items()} == published["example_counts"]


def test_subsets_of_another_benchmark_are_refused():
    with pytest.raises(DataError, match="none of the subsets Factuality, Ties is RewardBench's"):
        section_scores({"Ties": 1.0, "Factuality": 1.0})


def test_best_of_n_shares_the_credit_of_a_tie():
    rows = [(2.0, 1.0, 0.0, -1.0), (2.0, 2.0, 0.0, 2.0), (2.0, 1.0, 2.5, 1.0), (1.0, 1.0)]  # the chosen one first
    credit = best_of_n_credit(np.concatenate(rows), np.array([4, 4, 4, 2]))
    assert credit == pytest.approx([1.0, 1 / 3, 0.0, 0.5])


def test_rewardbench_2_is_the_plain_mean_of_its_subsets():
    assert rewardbench2_scores({"Math": 0.5, "Ties": 0.8})["score"] == pytest.approx(0.65)


TIES_IDS = ["ref:1", "tied:1", "ref:2", "tied:2", "tied:3"]
TIES_CORRECT = [[2.0], [3.0, 2.5, 2.0], [0.5], [4.0, 1.0], [1.0, 1.0]]
TIES_INCORRECT = [[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.5], [1.0, -2.0]]


def test_ties_by_hand():
    # Right: tied 1 (2 > 1) and 2 (1 > .5), not 3 (1 = 1); ref 1 (2 > 0), not 2. Tied rows with a partner: 1 has
    # m_ci = 1, m_cc = 1; 2 has m_ci = .5, m_cc = 3: neither above. tanh terms: min(1, 2) / 1 - 1 = 0 and -.5 / 3 - 1.
    expected = 0.3 * 2 / 3 + 0.3 * 1 / 2 + 0.01 * (0.0 + math.tanh(-0.5 / 3 - 1)) / 2
    assert ties_score(TIES_IDS, TIES_CORRECT, TIES_INCORRECT) == pytest.approx(expected)


def test_ties_golden_of_the_rewardbench_package():
    """What `process_single_model` of rewardbench 0.1.4 returns for these scores."""
    assert ties_score(TIES_IDS, TIES_CORRECT, TIES_INCORRECT) == pytest.approx(0.34588399677207055, abs=1e-15)


def test_a_reward_that_sees_only_right_and_wrong_has_the_full_ties_score():
    ids = ["ref:7", "tied:7"]
    assert ties_score(ids, [[5.0], [5.0, 5.0]], [[0.0], [0.0]]) == pytest.approx(1.0)  # m_cc = 0: no tanh term
    nearly = ties_score(ids, [[5.0], [5.0, 4.99]], [[0.0], [0.0]])
    assert nearly == pytest.approx(1.0 + 0.01 * math.tanh(4.99 / 0.01 - 1))


def test_ties_do_not_depend_on_the_order_of_rows_and_repeat_with_them():
    order = [4, 2, 0, 3, 1]
    columns = [[column[i] for i in order] for column in (TIES_IDS, TIES_CORRECT, TIES_INCORRECT)]
    whole = ties_score(TIES_IDS, TIES_CORRECT, TIES_INCORRECT)
    assert ties_score(*columns) == pytest.approx(whole)
    statistic = ties_statistic(TIES_IDS, TIES_CORRECT, TIES_INCORRECT)
    assert statistic(np.array([0, 1, 2, 3, 4] * 3))["Ties"] == pytest.approx(whole)
    only_first = statistic(np.array([0, 1]))["Ties"]
    assert only_first == pytest.approx(0.3 + 0.3)


def test_ties_rows_are_paired_by_their_names():
    assert ties_number("ref:12") == ("ref", 12)
    assert ties_number("tied:0") == ("tied", 0)
    assert ties_number("12") is None
    with pytest.raises(DataError, match="'12' must be named ref:<n> or tied:<n>"):
        ties_score(["12"], [[1.0]], [[0.0]])


def test_the_style_matrix_separates_substance_from_style():
    # Reward = style alone: 1, 2, 3 on both sides. Right only where the chosen one is the fancier.
    wins = style_wins(np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 2.0, 3.0]]))
    assert wins.tolist() == [[[0, 0, 0], [1, 0, 0], [1, 1, 0]]]
    scores = rm_bench_scores(wins, ["chat"])
    assert scores == {
        "easy": 1.0,
        "normal": 0.0,
        "hard": 0.0,
        "chat": pytest.approx(1 / 3),
        "score": pytest.approx(1 / 3),
    }


def test_a_reward_for_substance_alone_is_right_at_every_difficulty():
    wins = style_wins(np.full((2, 3), 5.0), np.full((2, 3), 4.0))
    assert set(rm_bench_scores(wins, ["chat", "math"]).values()) == {1.0}


def test_domains_weigh_the_same_and_safety_is_the_mean_of_its_halves():
    right, wrong = np.ones((3, 3)), np.zeros((3, 3))
    half = np.diag([1.0, 1.0, 1.0])  # right on the diagonal alone
    wins = np.stack([right, right, right, half, wrong, wrong])
    scores = rm_bench_scores(wins, ["chat", "chat", "chat", "safety-refuse", "safety-response", "code"])
    assert scores["chat"] == 1.0
    assert scores["safety"] == pytest.approx((1 / 3 + 0) / 2)
    assert scores["code"] == 0.0
    assert scores["normal"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert scores["hard"] == scores["easy"] == pytest.approx(1 / 3)
    assert scores["score"] == pytest.approx((1 + 1 / 6 + 0) / 3)


def test_a_row_without_three_styles_is_refused():
    with pytest.raises(ShapeError, match="compares 3 with 3 responses"):
        style_wins(np.ones((2, 2)), np.ones((2, 2)))


def test_a_ties_row_that_is_there_twice_is_refused():
    with pytest.raises(DataError, match="the Ties row 'ref:01' is there twice"):
        ties_score(["ref:1", "tied:1", "ref:01"], [[1.0]] * 3, [[0.0]] * 3)
