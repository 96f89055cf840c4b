"""Answer files of both layouts hold the same answers."""

import json

import pytest

from pipeline.benchmark.arena_hard.answers import ArenaAnswer, answer_styles, read_arena_answers, write_arena_answers
from pipeline.benchmark.arena_hard.style_control import (
    StyleFeatures,
)
from pipeline.errors import DataError
from tests.benchmark.arena_hard.battle_rows import written


def test_an_answer_given_twice_is_named_by_both_lines():
    answers = [ArenaAnswer(question_id="q", model="m", output="x", num_tokens=1, place=f"a, line {n}") for n in (1, 5)]
    with pytest.raises(DataError, match="a, line 5: m answers question q again, as in a, line 1"):
        answer_styles(answers)


def test_answers_of_both_layouts_give_the_same_style(tmp_path):
    text = "# Title\n- **a**"
    counted_inside = {"turns": [{"content": text, "token_len": 7}]}
    old = {"question_id": "q", "model_id": "m", "choices": [counted_inside]}
    middle = {**old, "choices": [{"turns": [{"content": text}]}], "conv_metadata": {"token_len": 7}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": {"answer": text}}]
    new = {"uid": "q", "model": "m", "messages": messages, "metadata": {"token_len": 7}}
    for row in (old, middle, new):
        styles = answer_styles(read_arena_answers([written(tmp_path, "a.jsonl", row)]))
        assert styles == {("m", "q"): StyleFeatures(tokens=7, headers=1, lists=1, bolds=1)}


def test_answers_are_written_as_either_edition_reads_them(tmp_path):
    answer = ArenaAnswer(question_id="q", model="tiny", output="## Bécause\n1. **x**", num_tokens=4)
    path = tmp_path / "model_answer" / "tiny.jsonl"
    write_arena_answers(path, [answer], prompts={"q": "why ?"}, rules="v2")
    row = json.loads(path.read_text())
    assert (row["uid"], row["model"], row["messages"][0]["content"]) == ("q", "tiny", "why ?")
    assert row["messages"][-1]["content"]["answer"] == "## Bécause\n1. **x**"
    # Upstream's v2 takes the features by position.
    sums = [v if isinstance(v, int) else sum(v.values()) for v in row["metadata"].values()]
    assert sums == [4, 1, 1, 1]
    assert read_arena_answers([str(path)]) == [answer]

    write_arena_answers(path, [answer], prompts={"q": "why ?"}, rules="v0.1")
    row = json.loads(path.read_text())
    assert (row["question_id"], row["model_id"]) == ("q", "tiny")
    # Early readers take the length from the turn, later ones the features from conv_metadata.
    assert row["choices"] == [{"index": 0, "turns": [{"content": "## Bécause\n1. **x**", "token_len": 4}]}]
    assert [sum(v.values()) for v in list(row["conv_metadata"].values())[1:]] == [1, 1, 1]
    assert list(row["conv_metadata"]) == ["token_len", "header_count", "list_count", "bold_count"]
    assert read_arena_answers([str(path)]) == [answer]


@pytest.mark.parametrize(
    ("turn", "letter"),
    [
        ({"content": "x"}, r"a.jsonl, line 1: no answer with its number of tokens \(KeyError"),
        ({"content": "x", "token_len": "7"}, "line 1: 'x' is no answer, or '7' no number of tokens"),
        ({"content": "x", "token_len": True}, "line 1: 'x' is no answer, or True no number of tokens"),
    ],
)
def test_an_answer_without_its_length_is_refused(turn, letter, tmp_path):
    row = {"question_id": "q", "model_id": "m", "choices": [{"turns": [turn]}]}
    with pytest.raises(DataError, match=letter):
        read_arena_answers([written(tmp_path, "a.jsonl", row)])
