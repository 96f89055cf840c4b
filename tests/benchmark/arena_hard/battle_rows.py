"""Battles, judgments and files of Arena-Hard for its tests."""

import json

import pytest

from pipeline.benchmark.arena_hard.battles import Battle, GamePair
from pipeline.benchmark.arena_hard.games import read_games
from tests.support.paths import SHARED_DATA

SHARED = SHARED_DATA / "arena_hard"

needs_public_data = pytest.mark.skipif(not SHARED.exists(), reason="needs the public data folder beside the checkout")


def battle(outcome, model_a="base", model_b="m", question_id="q", weight=1):
    return Battle(question_id=question_id, model_a=model_a, model_b=model_b, outcome=outcome, weight=weight)


def judged(first, second, model="m", question_id="q"):
    return GamePair(question_id=question_id, model=model, baseline="base", judge="j", verdicts=(first, second))


def public_battles(name):
    return read_games([str(SHARED / name)], baseline="gpt-4-0314").battles


def written(tmp_path, name, *rows):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
