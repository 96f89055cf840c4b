import json
import math

import pytest

from pipeline.benchmark.scored_answers import read_scored_answers, write_scored_answers
from pipeline.errors import DataError, ShapeError
from pipeline.evaluation.win_rate import compare_answers, wilson_interval, win_rate
from pipeline.records import Answer, RewardScore


def test_a_tie_is_half_a_win():
    metrics = win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 1.0, 5.0])
    assert metrics["win_rate"] == pytest.approx((2 + 0.5) / 4)
    assert metrics["ties"] == 0.25


def test_the_wilson_interval_has_its_textbook_value():
    # Agresti and Coull 1998: 5 successes of 10 at 95%: (.2366, .7634); 0 of 10: (0, .2775)
    assert wilson_interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


@pytest.mark.parametrize(("scores", "baseline"), [([], []), ([1.0], [1.0, 2.0])])
def test_unpaired_scores_are_refused(scores, baseline):
    with pytest.raises(ShapeError):
        win_rate(scores, baseline)


def answer(output, objective_weights=(0.25, 0.75), objective_scores=(0.0, 2.0)):
    score = RewardScore(mean=1.5, std=0.5, objective_weights=objective_weights, objective_scores=objective_scores)
    return Answer(prompt_id="p", instruction="why ?", output=output, generator="tiny-base", score=score)


def test_answers_that_open_alike_are_counted_with_the_opening_that_most_aligned_answers_have():
    aligned = [answer("I'm sorry for it."), answer("I'm sorry for\nthat"), answer("No."), answer("I'm sorry, for now")]
    base = [answer("I'm sorry for you"), answer("Yes it is"), answer("Yes it is so"), answer("")]
    metrics = compare_answers(aligned, base, (), None)
    assert (metrics["opening/aligned"], metrics["opening/base"]) == (0.5, 0.25)


def test_answers_round_trip_in_alpaca_evals_form(tmp_path):
    path = tmp_path / "model_outputs.json"
    answers = [answer("because"), answer("ünïcode", (), ()), answer("", tuple(range(12)), tuple(range(12)))]
    write_scored_answers(path, answers, dataset="tiny")
    assert read_scored_answers(path) == answers
    rows = json.loads(path.read_text())
    assert (rows[0]["instruction"], rows[0]["output"], rows[0]["generator"]) == ("why ?", "because", "tiny-base")
    # alpaca_eval drops repeated rows, and cannot compare nested ones.
    assert {type(value) for row in rows for value in row.values()} <= {str, int, float}


@pytest.mark.parametrize("text", ["{", '[{"output": "x"}]', "3"])
def test_a_file_without_answers_is_refused(text, tmp_path):
    path = tmp_path / "model_outputs.json"
    path.write_text(text)
    with pytest.raises(DataError, match="holds no scored answers"):
        read_scored_answers(path)


@pytest.mark.parametrize("field", ["reward_mean", "reward_std", "objective_score_1"])
@pytest.mark.parametrize("value", [math.nan, math.inf, True, "1"])
def test_an_answer_without_a_finite_reward_is_refused(field, value, tmp_path):
    path = tmp_path / "model_outputs.json"
    write_scored_answers(path, [answer("because")], dataset="tiny")
    [row] = json.loads(path.read_text())
    path.write_text(json.dumps([row | {field: value}]))
    with pytest.raises(DataError, match=f"{field}.*'why \\?' is .*, no finite number"):
        read_scored_answers(path)
