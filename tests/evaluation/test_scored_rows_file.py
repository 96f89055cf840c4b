"""Scoring into a file: streaming, interruption, refusal."""

import json
import math
import tracemalloc

import pytest

from pipeline.data.evaluation_examples import EvaluationExample
from pipeline.errors import DataError, NumericsError
from pipeline.evaluation.scored_rows import key_column
from pipeline.evaluation.scored_rows_file import ROWS_PER_CHUNK, read_scored_rows, write_scored_rows
from pipeline.records import RewardScore


class LengthScorer:
    """Rewards a response by its number of characters; reads 40 of them at most."""

    def __init__(self):
        self.calls = []

    def score(self, prompts, responses):
        self.calls.append(len(responses))
        return [
            RewardScore(mean=float(len(text)), std=0.5, objective_weights=(1.0,), objective_scores=(float(len(text)),))
            for text in responses
        ]

    def fits(self, prompt, response):
        return len(response) <= 40


def comparison(n, **changes):
    fields = {
        "id": str(n),
        "subset": "all",
        "source": "rows",
        "place": f"rows.jsonl, line {n}",
        "prompt": ({"role": "user", "content": f"question {n}"},),
        "chosen": ("x" * (n % 7),),
        "rejected": ("y" * 3,),
        "annotators_tie": False,
    }
    return EvaluationExample(**{**fields, **changes})


def score(comparisons, path, scorer=None, scored_by="model/cpu"):
    scorer, reports = scorer or LengthScorer(), []
    write_scored_rows(
        comparisons,
        path,
        scored_by=scored_by,
        load_scorer=lambda: scorer,
        report=lambda done, kept: reports.append((done, kept)),
    )
    return scorer, reports


def test_scores_are_read_back_as_they_were_given(tmp_path):
    path = tmp_path / "rows.jsonl"
    lists = comparison(1, chosen=("a", "bbbb"), rejected=("<think>long thoughts</think>\ncc",), annotators_tie=True)
    longer = comparison(2, rejected=("y" * 41,))
    score([lists, longer], path)
    rows, scored_by = read_scored_rows(path)
    assert scored_by == "model/cpu"
    assert rows.rewards.tolist() == [1.0, 4.0, 31.0, 2.0, 41.0]
    assert rows.characters.tolist() == [1, 4, 2, 2, 41]  # thoughts are not scored
    assert (rows.num_chosen.tolist(), rows.num_responses.tolist()) == ([2, 1], [3, 2])
    assert (rows.annotators_tie.tolist(), rows.cut.tolist()) == ([True, False], [False, True])
    assert [f"{key:016x}" for key in rows.content_key] == [lists.content_key, longer.content_key]
    assert rows.margin_std[1] == pytest.approx(math.sqrt(0.5))  # nothing says that they are correlated: 1/4 + 1/4
    line = json.loads(path.read_text().splitlines()[0])
    assert line["chosen"][1]["objective_scores"] == [4.0]  # the reasons of a reward stay in the file


def test_error_bar_and_log_odds_of_a_pair_are_those_of_its_difference(tmp_path):
    class Scorer(LengthScorer):
        def score(self, prompts, responses):
            bare = {"objective_weights": (), "objective_scores": (), "temperature": 2.0}
            chosen = RewardScore(mean=1.0, std=5.0, deviations=(3.0, 4.0), **bare)
            rejected = RewardScore(mean=0.5, std=4.0, deviations=(0.0, 4.0), **bare)
            return [chosen, rejected]

    score([comparison(1)], tmp_path / "rows.jsonl", scorer=Scorer())
    rows, _ = read_scored_rows(tmp_path / "rows.jsonl")
    # Both do not know the same thing, which cancels: 3, and not the root of 25 + 16.
    assert rows.margin_std == pytest.approx([3.0])
    assert rows.log_odds == pytest.approx([0.5 / math.sqrt(4.0 + math.pi / 8 * 9.0)])


def test_rows_are_scored_while_they_are_read(tmp_path):
    """Texts of one chunk are in memory, however long the file is."""
    scorer, ahead = LengthScorer(), []

    def reading():
        for n in range(3 * ROWS_PER_CHUNK + 5):
            ahead.append(2 * n - sum(scorer.calls))
            yield comparison(n)

    _, reports = score(reading(), tmp_path / "rows.jsonl", scorer)
    assert max(ahead) < 2 * ROWS_PER_CHUNK
    assert reports == [
        (ROWS_PER_CHUNK, 0),
        (2 * ROWS_PER_CHUNK, 0),
        (3 * ROWS_PER_CHUNK, 0),
        (3 * ROWS_PER_CHUNK + 5, 0),
    ]


def test_an_interrupted_run_goes_on_behind_its_last_whole_line(tmp_path):
    rows = [comparison(n) for n in range(ROWS_PER_CHUNK + 40)]
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    score(rows, whole)
    broken.write_bytes(whole.read_bytes()[: len(whole.read_bytes()) * 3 // 4])
    kept = broken.read_bytes().count(b"\n")
    scorer, reports = score(rows, broken)
    assert broken.read_bytes() == whole.read_bytes()
    assert sum(scorer.calls) == 2 * (len(rows) - kept)
    assert reports == [(len(rows), kept)]


def test_a_finished_evaluation_loads_no_model(tmp_path):
    path = tmp_path / "rows.jsonl"
    score([comparison(1)], path)

    def refuse():
        raise AssertionError("loaded")

    write_scored_rows([comparison(1)], path, scored_by="model/cpu", load_scorer=refuse, report=lambda done, kept: None)
    assert len(read_scored_rows(path)[0]) == 1


@pytest.mark.parametrize(
    ("rows", "scored_by", "line"),
    [
        ([comparison(1), comparison(2)], "other/cpu", 1),
        ([comparison(1), comparison(3)], "model/cpu", 2),
        ([comparison(1)], "model/cpu", 2),
        ([comparison(1, subset="other"), comparison(2)], "model/cpu", 1),
        ([comparison(1), comparison(2, id="7")], "model/cpu", 2),
    ],
    ids=["another model", "another row", "fewer rows", "another subset field", "another name"],
)
def test_rows_of_another_evaluation_are_neither_used_nor_overwritten(tmp_path, rows, scored_by, line):
    path = tmp_path / "rows.jsonl"
    score([comparison(1), comparison(2)], path)
    before = path.read_bytes()
    with pytest.raises(DataError, match=f"line {line}: scored by another model, or from other data"):
        score(rows, path, scored_by=scored_by)
    assert path.read_bytes() == before


def test_a_file_that_is_something_else_is_not_overwritten(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("my thesis\n")
    with pytest.raises(DataError, match="Give another --out"):
        score([comparison(1)], path)
    assert path.read_text() == "my thesis\n"


def test_a_reward_that_is_no_number_is_named_with_its_row(tmp_path):
    class Broken(LengthScorer):
        def score(self, prompts, responses):
            return [RewardScore(mean=math.nan, std=0.0, objective_weights=(), objective_scores=()) for _ in responses]

    with pytest.raises(NumericsError, match=r"rows\.jsonl, line 4: reward nan .* for the response 'xxxx'"):
        score([comparison(4)], tmp_path / "rows.jsonl", Broken())


def test_rows_are_aligned_by_their_texts(tmp_path):
    rows = [comparison(n, rejected=("y" * 3,) * (1 + n % 2)) for n in range(5)]
    score(reversed(rows), tmp_path / "other.jsonl")
    score(rows, tmp_path / "rows.jsonl")
    others, ours = read_scored_rows(tmp_path / "other.jsonl")[0], read_scored_rows(tmp_path / "rows.jsonl")[0]
    others = others.in_order_of(ours.content_key, place="other.jsonl")
    assert others.content_key.tolist() == ours.content_key.tolist()
    assert others.rewards.tolist() == ours.rewards.tolist() == [0, 3, 1, 3, 3, 2, 3, 3, 3, 3, 4, 3]
    assert others.num_responses.tolist() == [2, 3, 2, 3, 2]


@pytest.mark.parametrize(("first", "count", "missing"), [(0, 4, 0), (1, 5, 1)])
def test_other_rows_are_refused(tmp_path, first, count, missing):
    score([comparison(n) for n in range(5)], tmp_path / "other.jsonl")
    others, _ = read_scored_rows(tmp_path / "other.jsonl")
    keys = key_column(comparison(n).content_key for n in range(first, first + count))
    with pytest.raises(DataError, match=rf"5 rows and this evaluation {count}, of which {missing} are not in it"):
        others.in_order_of(keys, place="other.jsonl")


def test_a_scored_pair_takes_less_than_a_hundred_bytes(tmp_path):
    """Texts and reasons stay in the file: a million pairs are as much memory as a small model's embeddings."""
    path = tmp_path / "rows.jsonl"
    score((comparison(n) for n in range(3000)), path)
    read_scored_rows(path)  # what is imported and interned on the way
    tracemalloc.start()
    try:
        rows, _ = read_scored_rows(path)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows) == 3000
    assert held / len(rows) < 100


def test_a_file_without_scores_is_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "why ?", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(DataError, match=r"line 1: not a scored row .* Give the rows\.jsonl of an evaluation"):
        read_scored_rows(path)


@pytest.mark.parametrize("field", ["content_key", "prompt_key", "chosen"])
def test_a_row_that_was_edited_is_named(tmp_path, field):
    path = tmp_path / "rows.jsonl"
    score([comparison(1), comparison(2)], path)
    first, second = path.read_text().splitlines()
    path.write_text(first + "\n" + json.dumps(json.loads(second) | {field: "mine"}) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: not a scored row"):
        read_scored_rows(path)


def test_rows_of_two_models_in_one_file_are_refused(tmp_path):
    score([comparison(1)], tmp_path / "a.jsonl", scored_by="a/cpu")
    score([comparison(1)], tmp_path / "b.jsonl", scored_by="b/cpu")
    both = tmp_path / "both.jsonl"
    both.write_text((tmp_path / "a.jsonl").read_text() + (tmp_path / "b.jsonl").read_text())
    with pytest.raises(DataError, match="rows of 2 models"):
        read_scored_rows(both)


@pytest.mark.parametrize("value", [math.nan, math.inf, True])
def test_a_row_whose_reward_is_no_finite_number_is_named(value, tmp_path):
    path = tmp_path / "rows.jsonl"
    score([comparison(1), comparison(2)], path)
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    second["rejected"][0]["mean"] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in (first, second)))
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: not a scored row .* is no finite number"):
        read_scored_rows(path)
