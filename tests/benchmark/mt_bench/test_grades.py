import json
import math
import os
import types

import pyarrow.parquet as pq
import pytest

from pipeline.benchmark.mt_bench.answers import (
    TEMPERATURES,
)
from pipeline.benchmark.mt_bench.grades import (
    NO_GRADE,
    TurnGrade,
    category_of,
    mean_grades,
    parse_grade,
    read_grades,
    write_grades,
)
from pipeline.errors import DataError
from tests.support.paths import SHARED_DATA

SHARED = SHARED_DATA / "mt_bench"

needs_public_data = pytest.mark.skipif(not SHARED.exists(), reason="needs the public data folder beside the checkout")


def grade(score, question_id=81, turn=1, model="m"):
    return TurnGrade(
        question_id=question_id,
        model=model,
        judge="gpt-4",
        template="single-v1" if turn == 1 else "single-v1-multi-turn",
        turn=turn,
        user_prompt="grade this",
        judgment=f"Rating: [[{score}]]",
        score=score,
    )


@pytest.mark.parametrize(
    ("judgment", "score"),
    [
        ("Rating: [[7]]", 7.0),
        ("Rating: [[8.5]], not [[9]]", 8.5),
        ("Rating: [6]", 6.0),
        ("item [1] earns [[4]]", 4.0),
        ("Rating: 7", NO_GRADE),
        ("Rating: [[seven]]", NO_GRADE),
        ("Rating: [[7/10]]", NO_GRADE),
        ("Rating: [[85]]", NO_GRADE),
        ("Rating: [[0]]", NO_GRADE),
        ("Rating: [[10.5]]", NO_GRADE),
        ("Rating: [[1]]", 1.0),
        ("Rating: [[10]]", 10.0),
    ],
)
def test_the_first_double_bracket_is_the_score_else_the_first_single(judgment, score):
    assert parse_grade(judgment) == score


def test_the_average_is_over_judgments_not_over_turns():
    # Turn 1: 8, 6, 4; turn 2: 2 and a failure. (8 + 6 + 4 + 2) / 4 = 5, where the mean of turns would be 4.
    judgments = [grade(8.0), grade(6.0, 82), grade(4.0, 91), grade(2.0, 81, turn=2), grade(NO_GRADE, 82, turn=2)]
    metrics = mean_grades(judgments)["m"]
    assert (metrics["turn_1"], metrics["turn_2"], metrics["average"]) == (6.0, 2.0, 5.0)
    assert metrics["category/writing"] == pytest.approx((8 + 6 + 2) / 3)
    assert metrics["category/roleplay"] == 4.0
    assert (metrics["failures"], metrics["judgments"]) == (1, 5)
    assert "category/math" not in metrics


def test_models_are_graded_apart():
    result = mean_grades([grade(8.0, model="x"), grade(2.0, model="y")])
    assert (result["x"]["average"], result["y"]["average"]) == (8.0, 2.0)


def test_the_interval_draws_questions_with_both_their_turns():
    # Two questions, (10, 10) and (1, 1): a draw of two questions averages 1, 5.5 or 10 and nothing between.
    metrics = mean_grades([grade(s, q, turn) for s, q in ((10.0, 81), (1.0, 82)) for turn in (1, 2)])["m"]
    assert (metrics["low"], metrics["average"], metrics["high"]) == (1.0, 5.5, 10.0)


def test_the_interval_has_the_width_of_the_normal_one_and_comes_again():
    # 80 questions, half 4 and half 8: sd of the mean = 2 / sqrt(80) = 0.2236
    judgments = [grade(4.0 if n % 2 else 8.0, 81 + n) for n in range(80)]
    metrics = mean_grades(judgments, seed=5)["m"]
    assert metrics["high"] - metrics["low"] == pytest.approx(2 * 1.96 * 0.2236, abs=0.08)
    assert mean_grades(judgments, seed=5)["m"] == metrics


@pytest.mark.parametrize(
    ("judgments", "letter"),
    [
        ([], "no judgments to average"),
        ([grade(NO_GRADE), grade(NO_GRADE, 82)], "none of the 2 judgments of 'm' holds a score"),
        ([grade(5.0, 161)], "questions 81 to 160, not 161"),
    ],
)
def test_judgments_without_a_mean_are_refused(judgments, letter):
    with pytest.raises(DataError, match=letter):
        mean_grades(judgments)


@needs_public_data
def test_the_questions_have_the_categories_of_the_public_file():
    rows = [json.loads(line) for line in (SHARED / "question.jsonl").read_text().splitlines()]
    assert len(rows) == 80
    assert {row["question_id"]: category_of(row["question_id"]) for row in rows} == {
        row["question_id"]: row["category"] for row in rows
    }
    assert {row["category"] for row in rows} == set(TEMPERATURES)


# ----------------------------------------------------------------------------- real judgments
@pytest.fixture(scope="module")
def real_judgments():
    """GPT-4's judgments of two models, with one of them failed by hand."""
    rows = pq.read_table(SHARED / "judgment_gpt-4_single.parquet").to_pylist()
    return [
        TurnGrade(
            question_id=row["question_id"],
            model=row["model"],
            judge=row["judge"],
            template=row["judge_template"],
            turn=row["turn"],
            user_prompt=row["user_prompt"],
            judgment=row["judgment"],
            score=row["score"],
        )
        for row in rows
    ]


def with_one_failure(judgments):
    [place] = [n for n, j in enumerate(judgments) if (j.model, j.question_id, j.turn) == ("mistral-orpo-mix", 82, 1)]
    failed = TurnGrade(**{**vars(judgments[place]), "score": NO_GRADE})
    return [*judgments[:place], failed, *judgments[place + 1 :]]


@needs_public_data
def test_real_judgments_have_their_published_means(real_judgments):
    result = mean_grades(real_judgments)
    published = {"mistral-orpo-mix": (6.431, 5.575), "mistral-orpo-trl": (7.731, 6.600)}
    for model, (first, second) in published.items():
        assert result[model]["turn_1"] == pytest.approx(first, abs=0.001)
        assert result[model]["turn_2"] == pytest.approx(second, abs=0.001)
        assert result[model]["average"] == pytest.approx((first + second) / 2, abs=0.001)
        assert result[model]["low"] < result[model]["average"] < result[model]["high"]


@needs_public_data
def test_a_failed_judgment_leaves_the_mean(real_judgments):
    # It was a 1 among 160 that sum to 6.43125 * 80 + 5.575 * 80 = 960.5.
    metrics = mean_grades(with_one_failure(real_judgments))["mistral-orpo-mix"]
    assert metrics["average"] == pytest.approx((960.5 - 1) / 159)
    assert metrics["failures"] == 1


@needs_public_data
def test_the_scores_of_real_judgments_are_parsed_again(real_judgments):
    assert [parse_grade(j.judgment) for j in real_judgments] == [j.score for j in real_judgments]


@needs_public_data
def test_fastchat_prints_the_same_means_of_the_file_we_write(real_judgments, tmp_path, monkeypatch):
    reason = "needs FastChat: pip install --no-deps fschat==0.2.36"
    show_result = pytest.importorskip("fastchat.llm_judge.show_result", reason=reason)
    judgments = with_one_failure(real_judgments)
    path = tmp_path / "gpt-4_single.jsonl"
    write_grades(path, judgments)
    printed = []
    monkeypatch.setattr("builtins.print", lambda *values: printed.extend(values))
    show_result.display_result_single(
        types.SimpleNamespace(input_file=str(path), bench_name="mt_bench", model_list=None, judge_model="gpt-4")
    )
    monkeypatch.undo()
    first, second, average = (value["score"] for value in printed if not isinstance(value, str))
    for model, metrics in mean_grades(judgments).items():
        assert metrics["turn_1"] == pytest.approx(first[model, 1])
        assert metrics["turn_2"] == pytest.approx(second[model, 2])
        assert metrics["average"] == pytest.approx(average[model])


# ----------------------------------------------------------------------------- files
def test_judgments_round_trip_through_fastchats_file(tmp_path):
    path = tmp_path / "model_judgment" / "gpt-4_single.jsonl"
    judgments = [grade(8.5), grade(NO_GRADE, 82, turn=2)]
    write_grades(path, judgments)
    assert read_grades([str(path)]) == judgments
    row = json.loads(path.read_text().splitlines()[0])
    assert row["judge"] == ["gpt-4", "single-v1"]


GOOD = {
    "question_id": 81,
    "model": "m",
    "judge": ["gpt-4", "single-v1"],
    "user_prompt": "?",
    "judgment": "[[5]]",
    "score": 5,
    "turn": 1,
}


@pytest.mark.parametrize(
    ("change", "letter"),
    [
        ({"judge": ["gpt-4"]}, r"j.jsonl, line 1, field 'judge': \['gpt-4'\] is not"),
        ({"turn": 3}, "field 'turn': 3 is neither 1 nor 2"),
        ({"score": "5"}, "field 'score': '5' is not a number"),
        ({"score": True}, r"j.jsonl, line 1, field 'score': True is not a number"),
        ({"score": 85}, r"j.jsonl, line 1, field 'score': 85 is not in \[1, 10\]. Write -1"),
        ({"score": 0}, r"line 1, field 'score': 0 is not in \[1, 10\]"),
        ({"score": -0.5}, r"line 1, field 'score': -0.5 is not in \[1, 10\]"),
        ({"score": math.inf}, r"line 1, field 'score': inf is not in \[1, 10\]"),
        ({"turn": True}, "line 1, field 'turn': True is no int"),
        ({"question_id": "81"}, "field 'question_id': '81' is no int"),
        ({"question_id": 161}, r"j.jsonl, line 1, field 'question_id': MT-Bench has questions 81 to 160, not 161"),
    ],
)
def test_a_row_that_is_no_judgment_is_named(change, letter, tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(DataError, match=letter):
        read_grades([str(path)])


@pytest.mark.parametrize("mark", [-1, None, math.nan])
def test_a_file_says_in_three_ways_that_there_is_no_grade(mark, tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"turn": 2, "score": mark}))
    metrics = mean_grades(read_grades([str(path)]))["m"]
    assert (metrics["average"], metrics["failures"], metrics["judgments"]) == (5.0, 1, 2)


def test_a_turn_graded_twice_is_named_by_both_lines(tmp_path):
    common = {"question_id": 81, "model": "m", "user_prompt": "?", "judgment": "[[8]]", "score": 8, "turn": 1}
    rows = [{**common, "judge": [judge, "single-v1"]} for judge in ("gpt-4", "claude")]
    (tmp_path / "j.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"j.jsonl, line 2: turn 1 of question 81 by 'm' is graded again.*line 1"):
        read_grades([str(tmp_path / "j.jsonl")])


def test_a_grade_counts_once_however_its_file_is_named(tmp_path):
    file, link = tmp_path / "j.jsonl", tmp_path / "link.jsonl"
    file.write_text(json.dumps(GOOD))
    link.symlink_to(file)
    for again in (str(file), os.path.relpath(file), str(link)):
        with pytest.raises(DataError, match=r"line 1: turn 1 of question 81 by 'm' is graded again, as in .*line 1"):
            read_grades([str(file), again])
