"""Judgment files of both layouts hold the same games."""

import json
import os
from pathlib import Path

import pytest

from pipeline.benchmark.arena_hard.games import read_games
from pipeline.errors import DataError
from tests.benchmark.arena_hard.battle_rows import battle, written


def layouts(tmp_path, *games):
    """The same games in the v0.1 and in the v2 layout."""
    row = {"model": "m", "judge": "gpt-4o", "games": games}
    v0_1 = written(tmp_path, "v01.jsonl", {"question_id": "q", **row})
    return v0_1, written(tmp_path, "v2.jsonl", {"uid": "q", "category": "hard", "baseline": "base", **row})


def test_judgments_of_both_layouts_are_the_same_games(tmp_path):
    for file in layouts(tmp_path, {"score": "A>>B"}, {"score": "A=B"}):
        read = read_games([file], baseline="base")
        assert read.battles == [battle(1.0, weight=3), battle(0.5)]
        assert (read.judges, read.failures) == (("gpt-4o",), {"m": 0})


def test_a_file_is_read_by_the_rules_of_its_edition(tmp_path):
    v0_1, v2 = (read_games([f], baseline="base") for f in layouts(tmp_path, {"score": "A>>B"}, {"score": None}))
    assert (v0_1.battles, v2.battles) == ([battle(1.0, weight=3)], [])
    assert v0_1.failures == v2.failures == {"m": 1}


def test_a_game_that_is_missing_counts_as_failed(tmp_path):
    _, v2 = layouts(tmp_path, None, {"score": "A>B"})
    read = read_games([v2], baseline="base")
    assert (read.battles, read.failures) == ([], {"m": 1})


GOOD = {"uid": "q", "judge": "j", "model": "m", "baseline": "base", "games": [{"score": "A>B"}, {"score": "A>B"}]}


@pytest.mark.parametrize(
    ("change", "letter"),
    [
        ({"baseline": "other"}, r"x.jsonl, line 1: judged against 'other', not 'base'"),
        ({"games": [{"score": "A>B"}]}, r"field 'games': .* are not two games"),
        ({"games": [{"score": 1}, {"score": "A>B"}]}, r"field 'games': .* with a score like 'A>B'"),
        ({"model": None}, r"line 1, field 'model': None is no str"),
        ({"winner": "A"}, r"field 'winner': 'A' is none of model_a"),
    ],
)
def test_a_row_that_is_no_judgment_is_named(change, letter, tmp_path):
    with pytest.raises(DataError, match=letter):
        read_games([written(tmp_path, "x.jsonl", GOOD | change)], baseline="base")


def test_a_question_judged_twice_is_named_by_both_lines(tmp_path):
    files = [written(tmp_path, name, GOOD) for name in ("gpt.jsonl", "claude.jsonl")]
    with pytest.raises(DataError, match=r"claude.jsonl, line 1: 'm' is judged on question q again, as in .*gpt.jsonl"):
        read_games(files, baseline="base")


def names_of_one_file(path):
    """The path itself, the path from the working directory, and a link to it."""
    link = Path(path).with_name("link.jsonl")
    link.symlink_to(path)
    return [path, os.path.relpath(path), str(link)]


def test_a_judgment_counts_once_however_its_file_is_named(tmp_path):
    file = written(tmp_path, "x.jsonl", GOOD)
    for again in names_of_one_file(file):
        with pytest.raises(DataError, match=r"line 1: 'm' is judged on question q again, as in .*x.jsonl, line 1"):
            read_games([file, again], baseline="base")


def test_a_file_of_battles_counts_once_however_it_is_named(tmp_path):
    row = {"question_id": "q", "model_a": "base", "model_b": "m", "winner": "model_b"}
    file = written(tmp_path, "battles.jsonl", row, row, row)
    assert len(read_games([file], baseline="base").battles) == 3
    for again in names_of_one_file(file):
        with pytest.raises(DataError, match=r"holds the same battles as .*battles.jsonl"):
            read_games([file, again], baseline="base")


def test_the_files_of_a_directory_are_one_source_of_battles(tmp_path):
    row = {"question_id": "q", "model_a": "base", "model_b": "m", "winner": "model_b"}
    for name in ("1.jsonl", "2.jsonl"):
        written(tmp_path, name, row | {"question_id": name})
    assert len(read_games([str(tmp_path)], baseline="base").battles) == 2


def test_a_line_that_a_kill_cut_short_is_named(tmp_path):
    whole = json.dumps(GOOD)
    (tmp_path / "x.jsonl").write_text(f"{whole}\n{whole[:-7]}")
    with pytest.raises(DataError, match=r"x.jsonl, line 2: no JSON"):
        read_games([str(tmp_path / "x.jsonl")], baseline="base")
