"""Answer and question files of every benchmark."""

import json

import pytest

from pipeline.benchmark.policy_comparison.contest import (
    build_contests,
)
from pipeline.benchmark.policy_comparison.policy_answers import (
    Questions,
    answer_files,
    read_policy_answers,
    read_questions,
)
from pipeline.benchmark.scored_answers import write_scored_answers
from pipeline.errors import DataError
from pipeline.records import Answer
from tests.benchmark.policy_comparison.policies import (
    ARENA_QUESTION,
    MT_QUESTION,
    NO_QUESTIONS,
    arena_answer,
    lines,
    mt_answer,
    score,
)


def test_a_category_comes_by_prompt_id_by_instruction_or_from_the_answers_file(tmp_path):
    answers = [
        Answer(prompt_id=f"id-{text}", instruction=text, output="x", generator="a", score=score(1.0)) for text in "pqr"
    ]
    write_scored_answers(tmp_path / "model_outputs.json", answers, dataset="koala")
    questions = Questions(turns={}, categories={"id-p": "plan", "q": "quick"})
    found = read_policy_answers(tmp_path / "model_outputs.json", questions)
    assert found.categories == {"p": "plan", "q": "quick", "r": "koala"}
    assert found.rewards["p"] == score(1.0)


def test_question_files_of_every_benchmark_are_read_together(tmp_path):
    (tmp_path / "planted.json").write_text(json.dumps({"kinds": {"id": "plan"}, "weights": {}}))
    instructions = {"instruction": "why ?", "dataset": "koala"}
    asked = lines(tmp_path / "q.jsonl", MT_QUESTION, ARENA_QUESTION, instructions)
    found = read_questions([tmp_path / "planted.json", asked])
    assert found.turns == {81: ("write", "write again"), "u1": ("prove it",)}
    assert found.categories == {"id": "plan", "81": "writing", "u1": "hard", "why ?": "koala"}


@pytest.mark.parametrize(
    ("name", "text", "letter"),
    [
        ("q.jsonl", '{"category": "writing"}\n', r"q\.jsonl, line 1: not a question"),
        (
            "q.jsonl",
            '{"question_id": 81, "category": "writing", "turns": ["one"]}\n',
            r"q\.jsonl, line 1, field 'turns'",
        ),
        ("planted.json", "[]", r"planted\.json holds no kinds"),
    ],
)
def test_a_question_that_is_none_is_named_by_its_line(tmp_path, name, text, letter):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=letter):
        read_questions([tmp_path / name])


def test_a_directory_holds_the_answers_of_every_benchmark(tmp_path):
    questions = read_questions([lines(tmp_path / "q.jsonl", MT_QUESTION, ARENA_QUESTION)])
    answers = []
    for policy in ("base", "aligned"):
        home = tmp_path / policy
        outputs = [{"instruction": "why ?", "output": "so", "generator": policy}]
        home.mkdir()
        (home / "model_outputs.json").write_text(json.dumps(outputs))
        lines(home / "v2" / "model_answer" / f"{policy}.jsonl", arena_answer(policy))
        lines(home / "v0.1" / "model_answer" / f"{policy}.jsonl", arena_answer(policy))
        lines(home / "model_answer" / f"{policy}.jsonl", mt_answer(policy))
        answers += [read_policy_answers(file, questions) for file in answer_files(home)]
    found = {of.benchmark: of for of in build_contests(answers)}
    assert list(found) == ["alpaca_eval", "arena_hard", "mt_bench"]
    assert all(of.policies == ("base", "aligned") for of in found.values())
    assert found["arena_hard"].turns == (("prove it",),)
    assert found["mt_bench"].outputs["base"] == [("first", "second")]
    assert found["mt_bench"].categories == ("writing",)


@pytest.mark.parametrize(
    ("rows", "letter"),
    [
        ([arena_answer("m"), arena_answer("m", "u9")], r"a\.jsonl, line 2: m answers question u9, which is not among"),
        ([arena_answer("m")] * 2, r"a\.jsonl, line 2: m answers question u1 again, as in .*a\.jsonl, line 1"),
        ([mt_answer("m", turns=["one"])], r"a\.jsonl, line 1: m answers 1 of the 2 turns of question 81"),
        ([mt_answer("m", 99)], r"a\.jsonl, line 1: m answers question 99"),
        ([mt_answer("m"), {"question_id": 81}], r"a\.jsonl, line 2: no choices"),
    ],
)
def test_an_answer_to_no_question_or_to_one_twice_is_named_by_its_line(tmp_path, rows, letter):
    questions = read_questions([lines(tmp_path / "q.jsonl", MT_QUESTION, ARENA_QUESTION)])
    with pytest.raises(DataError, match=letter):
        read_policy_answers(lines(tmp_path / "a.jsonl", *rows), questions)


def test_answers_without_what_was_asked_need_the_questions(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl does not contain the questions\. Give .* as --questions"):
        read_policy_answers(lines(tmp_path / "a.jsonl", mt_answer("m")), NO_QUESTIONS)
    with pytest.raises(DataError, match="holds no answers: none of model_outputs"):
        answer_files(tmp_path)
