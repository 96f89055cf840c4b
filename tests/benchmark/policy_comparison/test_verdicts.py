"""The verdicts of every kind of judge."""

import pytest

from pipeline.benchmark.arena_hard.games import Games
from pipeline.benchmark.arena_hard.win_rates import bradley_terry_win_rates as arena_hard_win_rate
from pipeline.benchmark.policy_comparison.verdicts import (
    game_verdicts,
    grade_verdicts,
    judged_verdicts,
    reward_verdicts,
)
from pipeline.benchmark.policy_comparison.win_matrix import win_matrix
from pipeline.errors import DataError
from tests.benchmark.policy_comparison.policies import TWO, arena, game, grade, graded, grades_of, judged


def test_a_tie_is_half_a_win_and_both_directions_add_up():
    [verdicts] = reward_verdicts(TWO)
    matrix = win_matrix(TWO, verdicts)
    assert matrix["aligned"]["base"]["win_rate"] == 2.5 / 4
    assert matrix["base"]["aligned"]["win_rate"] == 1.5 / 4
    assert matrix["aligned"].keys() == {"base"}


def test_the_win_rate_of_judgments_is_alpaca_evals():
    [verdicts] = judged_verdicts(TWO, [judged([1.25, 2.0, 0, None])])
    cell = win_matrix(TWO, verdicts)["aligned"]["base"]
    assert verdicts.judge == "gpt"
    assert (cell["n"], cell["ties"]) == (3, 1 / 3)
    assert cell["win_rate"] == pytest.approx((0.25 + 1.0 + 0.5) / 3)
    assert win_matrix(TWO, verdicts)["base"]["aligned"]["win_rate"] == pytest.approx(1.25 / 3)


def test_judgments_are_joined_by_instruction():
    [verdicts] = judged_verdicts(TWO, [judged([2.0, 1.0], prompts=("s", "p"))])
    assert verdicts.pairs["aligned", "base"] == [0.0, None, None, 1.0]


@pytest.mark.parametrize(
    ("files", "letter"),
    [
        ([judged([1.0] * 4, baseline="gpt-4")], "there are no answers of 'gpt-4'"),
        ([judged([1.0], prompts=("elsewhere",))], "1 prompts that none of the policies answered, as 'elsewhere'"),
        ([judged([1.0] * 4)] * 2, "'gpt' compares 'aligned' with 'base' in two files"),
    ],
)
def test_judgments_of_something_else_are_refused(files, letter):
    with pytest.raises(DataError, match=letter):
        judged_verdicts(TWO, files)


def test_arena_hards_win_rate_is_its_own_a_clear_win_three_times():
    # p: the model wins clearly and draws: 3.5 of 4; q: it loses twice; r and s were not decided.
    battles = [game("p", 0.0, 3), game("p", 0.5), game("q", 1.0), game("q", 1.0)]
    [verdicts] = game_verdicts(arena("base", "m"), [Games(battles=battles, judges=("gpt",), failures={})])
    assert verdicts.pairs["m", "base"] == [3.5 / 4, 0.0, None, None]
    cell = win_matrix(arena("base", "m"), verdicts)["m"]["base"]
    assert cell["win_rate"] == pytest.approx(3.5 / 6)
    assert 100 * cell["win_rate"] == pytest.approx(arena_hard_win_rate(battles, "base")["m"]["win_rate"], abs=1e-4)
    assert win_matrix(arena("base", "m"), verdicts)["base"]["m"]["win_rate"] == pytest.approx(2.5 / 6)


def test_the_higher_mean_grade_of_both_turns_wins_and_a_missing_grade_is_no_verdict():
    rows = [*grades_of("base", (5, 5), (8, 6), (9, 9)), *grades_of("m", (3, 9), (7, 7), (10, -1))]
    [verdicts] = grade_verdicts(graded(), rows)
    assert verdicts.pairs["m", "base"] == [1.0, 0.5, None]
    assert verdicts.margins["m", "base"] == [1.0, 0.0, 0.0]
    assert verdicts.grades["m"] == [(3, 9), (7, 7), (10, None)]


@pytest.mark.parametrize(
    ("rows", "letter"),
    [
        ([grade("other", 81, 1, 5)], "grades turn 1 of question 81 by 'other', and there are no answers"),
        ([grade("m", 99, 2, 5)], "question 99 by 'm', a question that none of the policies answered"),
        ([grade("m", 81, 1, 5)] * 2, "'gpt-4' grades turn 1 of question 81 by 'm' in two files"),
    ],
)
def test_grades_of_something_else_are_refused(rows, letter):
    with pytest.raises(DataError, match=letter):
        grade_verdicts(graded(), rows)
