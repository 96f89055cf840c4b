"""Verdicts become battles by the rules of either edition."""

import pytest

from pipeline.benchmark.arena_hard.battles import count_failures, parse_verdict, to_battles
from tests.benchmark.arena_hard.battle_rows import judged


@pytest.mark.parametrize(
    ("text", "v0_1", "v2"),
    [
        ("My final verdict is: [[A>B]]", "A>B", "A>B"),
        ("[[A>B]] ... so again [[A>B]]", "A>B", "A>B"),
        ("at first [[A>B]], no: [[B>>A]]", None, "B>>A"),
        ("[A=B]", None, "A=B"),
        ("[[b>a]]", None, "B>A"),
        ("A is better", None, None),
        ("[[]]", None, None),
        ("[B>A] and then [[A>B]]", "A>B", "A>B"),
    ],
)
def test_each_edition_reads_verdicts_by_its_own_rules(text, v0_1, v2):
    assert (parse_verdict(text, "v0.1"), parse_verdict(text, "v2")) == (v0_1, v2)


@pytest.mark.parametrize(
    ("first", "second", "wins_of_the_model"),
    [("B>>A", "A>B", [(1.0, 3), (1.0, 1)]), ("A=B", "B>A", [(0.5, 1), (0.0, 1)]), ("A>>B", "A>>B", [(0, 3), (1, 3)])],
)
def test_a_clear_win_weighs_three_and_the_second_game_is_swapped(first, second, wins_of_the_model):
    battles = to_battles([judged(first, second)], "v0.1")
    assert [(1 - b.outcome, b.weight) for b in battles] == wins_of_the_model
    assert {(b.model_a, b.model_b) for b in battles} == {("base", "m")}


def test_v0_1_drops_the_failed_game_and_v2_its_question():
    judgments = [judged("A>B", None, question_id="1"), judged("B>A", "A>B", question_id="2")]
    assert len(to_battles(judgments, "v0.1")) == 3
    assert [b.question_id for b in to_battles(judgments, "v2")] == ["2", "2"]
    assert count_failures(judgments, "v0.1") == {"m": 1}


def test_only_v2_knows_labels_with_the_smaller_side_first():
    judgments = [judged("A<<B", "B=A")]
    assert to_battles(judgments, "v0.1") == []
    assert [(b.outcome, b.weight) for b in to_battles(judgments, "v2")] == [(0.0, 3), (0.5, 1)]
    assert (count_failures(judgments, "v0.1"), count_failures(judgments, "v2")) == ({"m": 2}, {"m": 0})
