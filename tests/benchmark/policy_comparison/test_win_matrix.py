"""Win rates with lengths and styles, by group of prompts."""

import pyarrow.parquet as pq
import pytest

from pipeline.benchmark.arena_hard.games import read_games
from pipeline.benchmark.policy_comparison.contest import (
    build_contest,
)
from pipeline.benchmark.policy_comparison.verdicts import (
    game_verdicts,
    reward_verdicts,
)
from pipeline.benchmark.policy_comparison.win_matrix import breakdown, difference_over_shared_opponent, win_matrix
from tests.benchmark.policy_comparison.policies import TWO, answers_of
from tests.support.paths import SHARED_DATA


def test_length_and_style_stand_beside_every_win_rate():
    # "# Title / - one / - **two**" has 6 words, a header, two list items and a bold span; "an answer" 2 words.
    [verdicts] = reward_verdicts(TWO)
    cell = win_matrix(TWO, verdicts)["aligned"]["base"]
    assert (cell["n"], cell["words"], cell["markdown"]) == (4, 4, 4)
    assert (cell["own_words"], cell["other_words"], cell["identical"]) == (6, 2, 0)


def test_identical_answers_are_counted():
    same = answers_of("same", [1.0] * 4, outputs={name: ("an answer" if name in "pq" else "other",) for name in "pqrs"})
    contest = build_contest([answers_of("base", [1.0] * 4), same])
    [verdicts] = reward_verdicts(contest)
    assert win_matrix(contest, verdicts)["same"]["base"]["identical"] == 2


def test_every_category_and_every_relation_of_lengths_has_its_win_rate():
    base = answers_of("base", [1.0] * 4, output="one two three four five", categories=("x", "x", "y"))
    texts = {"p": "one", "q": "1 2 3 4 5", "r": "1 2 3 4 5 6 7", "s": "1 2 3 4 5 6"}
    outputs = {prompt: (text,) for prompt, text in texts.items()}
    ours = answers_of("ours", [2.0] * 4, outputs=outputs)
    both = build_contest([base, ours])
    [verdicts] = reward_verdicts(both)
    groups = dict(breakdown(both, verdicts, ("ours", "base")))
    assert {group: metrics["n"] for group, metrics in groups.items()} == {
        "all prompts": 4,
        "no category": 1,
        "x": 2,
        "y": 1,
        "its answer is longer": 2,
        "about as long": 1,
        "its answer is shorter": 1,
    }
    assert groups["x"]["words"] == (-4 + 0) / 2
    assert groups["its answer is longer"]["words"] == (2 + 1) / 2


def test_one_category_is_no_breakdown():
    same = build_contest([answers_of(name, [1.0] * 4, categories=("x",) * 4) for name in ("a", "b")])
    [verdicts] = reward_verdicts(same)
    groups = dict(breakdown(same, verdicts, ("b", "a")))
    assert "x" not in groups
    assert groups["its answer is longer"] == {"n": 0}


def test_the_public_battles_of_arena_hard_show_their_leaderboard():
    file = SHARED_DATA / "arena_hard" / "battles_official_models_gpt4-1106-judge.jsonl"
    if not file.exists():
        pytest.skip("needs the public data folder beside the checkout")
    rows = pq.read_table(SHARED_DATA / "arena_hard" / "model_answer.parquet", columns=["uid", "model"]).to_pylist()
    by_model = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row["uid"])
    of = build_contest(
        [answers_of(model, [], prompts=uids, benchmark="arena_hard") for model, uids in by_model.items()]
    )
    [verdicts] = game_verdicts(of, [read_games([str(file)], baseline="gpt-4-0314")])
    matrix = win_matrix(of, verdicts)
    assert 100 * matrix["gpt-4-0613"]["gpt-4-0314"]["win_rate"] == pytest.approx(37.90, abs=0.005)
    assert 100 * matrix["gpt-3.5-turbo-0125"]["gpt-4-0314"]["win_rate"] == pytest.approx(23.34, abs=0.005)
    third, gap = difference_over_shared_opponent(verdicts, ("gpt-4-0613", "gpt-3.5-turbo-0125"))
    assert third == "gpt-4-0314"
    assert 100 * gap["difference"] == pytest.approx(37.90 - 23.34, abs=0.05)
    assert 0.05 < gap["low"] < gap["difference"] < gap["high"] < 0.24
