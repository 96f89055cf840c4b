"""MT-Bench's single-answer grading, against FastChat's public prompts and GPT-4's public judgments."""

import json

import pyarrow.parquet as pq
import pytest

from pipeline.benchmark.judges.collect_outcomes import collect_outcomes
from pipeline.benchmark.judges.judge import Judgment, Unanswered
from pipeline.benchmark.judges.judge_prompt import JudgePrompt
from pipeline.benchmark.judges.replay_judge import ReplayJudge
from pipeline.benchmark.mt_bench.answers import MTBenchAnswer, read_mt_bench_answers
from pipeline.benchmark.mt_bench.grades import parse_grade, read_grades
from pipeline.benchmark.mt_bench.judging import MTBenchJudging, read_grading_templates
from pipeline.benchmark.mt_bench.questions import MTBenchQuestion, read_mt_bench_questions
from pipeline.errors import DataError
from tests.support.paths import SHARED_DATA

SHARED = SHARED_DATA / "mt_bench"

USER = {
    "single-v1": "{question} -> {answer}",
    "single-v1-multi-turn": "{question_1} -> {answer_1}; {question_2} -> {answer_2}",
    "single-math-v1": "{question} = {ref_answer_1} -> {answer}",
    "single-math-v1-multi-turn": "{question_1}={ref_answer_1} {question_2}={ref_answer_2} {answer_1} | {answer_2}",
}
TEMPLATES = {name: JudgePrompt(system=f"system of {name}", user=user) for name, user in USER.items()}
QUESTIONS = [
    MTBenchQuestion(question_id=81, category="writing", turns=("q1", "q2")),
    MTBenchQuestion(question_id=111, category="math", turns=("p1", "p2")),
]
ANSWERS = [
    MTBenchAnswer(question_id=81, model="ours", turns=("a1", "{question_1}")),
    MTBenchAnswer(question_id=111, model="ours", turns=("b1", "b2")),
]
REFERENCES = [MTBenchAnswer(question_id=111, model="gpt-4", turns=("r1", "r2"))]


class GPT:
    name, model = "https://somewhere", "gpt-x"


def judging(questions=QUESTIONS, answers=ANSWERS, references=REFERENCES):
    return MTBenchJudging(questions, answers, references, TEMPLATES, parse=parse_grade)


def judgment_of(text, time=0.0):
    return Judgment(
        text=text, first_token_logprobs={}, finish_reason="stop", prompt_tokens=1, completion_tokens=1, time=time
    )


def test_each_turn_has_its_prompt_and_mathematics_its_reference():
    requests = judging().requests
    assert [request.messages[1]["content"] for request in requests] == [
        "q1 -> a1",
        "q1 -> a1; q2 -> {question_1}",
        "p1 = r1 -> b1",
        "p1=r1 p2=r2 b1 | b2",
    ]
    assert requests[3].messages[0] == {"role": "system", "content": "system of single-math-v1-multi-turn"}
    assert all(request.pair is None for request in requests)
    assert (requests[0].sampling.temperature, requests[0].sampling.max_tokens) == (0.0, 2048)


def test_judgments_have_fastchats_layout():
    outcomes = [judgment_of("good [[8.5]]", 3.0), judgment_of("bad"), Unanswered(reason="HTTP 502"), judgment_of("[3]")]
    result = judging().rows(outcomes, GPT())
    assert result.rows[0] == {
        "question_id": 81,
        "model": "ours",
        "judge": ["gpt-x", "single-v1"],
        "user_prompt": "q1 -> a1",
        "judgment": "good [[8.5]]",
        "score": 8.5,
        "turn": 1,
        "tstamp": 3.0,
    }
    assert [(row["question_id"], row["turn"], row["score"]) for row in result.rows] == [
        (81, 1, 8.5),
        (81, 2, -1),
        (111, 1, -1),
        (111, 2, 3.0),
    ]
    assert result.rows[2]["failure"] == "HTTP 502"
    assert result.unparsed == 1


def test_the_scorer_reads_what_is_written(tmp_path):
    rows = (
        judging()
        .rows([judgment_of("[[8]]"), judgment_of("?"), Unanswered(reason="x"), judgment_of("[[2]]")], GPT())
        .rows
    )
    path = tmp_path / "gpt-x_single.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(j.judge, j.template, j.turn, j.score) for j in read_grades([str(path)])] == [
        ("gpt-x", "single-v1", 1, 8.0),
        ("gpt-x", "single-v1-multi-turn", 2, -1.0),
        ("gpt-x", "single-math-v1", 1, -1.0),
        ("gpt-x", "single-math-v1-multi-turn", 2, 2.0),
    ]


def test_a_missing_reference_is_named():
    with pytest.raises(
        DataError, match=r"the reference answers of gpt-4, which end at .*, lack 1 of 1 questions, as 111"
    ):
        judging(references=[MTBenchAnswer(question_id=112, model="gpt-4", turns=("r1", "r2"))])


def test_an_answer_to_an_unknown_question_is_named_by_its_line(tmp_path):
    rows = [{"question_id": i, "model_id": "ours", "choices": [{"turns": ["a", "b"]}]} for i in (81, 82)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: ours answers question 82, which is not among the 2"):
        judging(answers=read_mt_bench_answers([str(tmp_path / "a.jsonl")]))


def test_a_question_given_twice_is_refused(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question_id": 81, "category": "writing", "turns": ["a", "b"]}\n' * 2)
    with pytest.raises(DataError, match=r"q\.jsonl, line 2: question 81 is there already"):
        read_mt_bench_questions(tmp_path / "q.jsonl")


def test_an_answer_to_one_turn_is_refused():
    short = [ANSWERS[0], MTBenchAnswer(question_id=111, model="ours", turns=("b1",))]
    with pytest.raises(DataError, match="ours answers question 111 in 1 turns, not in 2"):
        judging(answers=short)


def test_a_question_of_three_turns_is_refused(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question_id": 81, "category": "writing", "turns": ["a", "b", "c"]}\n')
    with pytest.raises(DataError, match=r"line 1, field 'turns': 3 turns"):
        read_mt_bench_questions(tmp_path / "q.jsonl")


def test_prompts_that_are_missing_or_hide_the_answer_are_named(tmp_path):
    path = tmp_path / "p.jsonl"

    def write(changes):
        lines = [
            {"name": name, "system_prompt": "s", "prompt_template": user}
            for name, user in (USER | changes).items()
            if user
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    write({})
    assert set(read_grading_templates(path)) == set(USER)
    write({"single-math-v1": ""})
    with pytest.raises(DataError, match="has no prompt single-math-v1"):
        read_grading_templates(path)
    write({"single-v1": "{question}"})
    with pytest.raises(DataError, match=r"line 1: the template has no \{answer\}"):
        read_grading_templates(path)


@pytest.fixture
def public():
    if not SHARED.exists():
        pytest.skip("the public data beside the project is not here")
    return SHARED


@pytest.mark.parametrize("model", ["mistral-orpo-mix", "mistral-orpo-trl"])
def test_gpt4s_public_judgments_replay_to_their_public_grades(public, tmp_path, model):
    """Prompts equal FastChat's to the letter, or nothing would be found; grades equal those in its file."""
    rows = [r for r in pq.read_table(public / "judgment_gpt-4_single.parquet").to_pylist() if r["model"] == model]
    assert len(rows) == 160
    templates = read_grading_templates(public / "judge_prompts.jsonl")
    replay = tmp_path / "gpt-4.cache"
    with replay.open("w") as file:
        for row in rows:
            system = templates[row["judge_template"]].system
            messages = [{"role": "system", "content": system}, {"role": "user", "content": row["user_prompt"]}]
            line = {"model": "gpt-4", "messages": messages, "judgment": {"text": row["judgment"]}}
            file.write(json.dumps(line) + "\n")
    answers = [
        MTBenchAnswer(question_id=row["question_id"], model=model, turns=tuple(row["turns"]))
        for row in pq.read_table(public / "model_answer_mistral-orpo.parquet").to_pylist()
        if row["model"] == model
    ]
    judged = MTBenchJudging(
        read_mt_bench_questions(public / "question.jsonl"),
        list({a.question_id: a for a in answers}.values()),
        read_mt_bench_answers([str(public / "reference_answer_gpt-4.jsonl")]),
        templates,
        parse=parse_grade,
    )
    judge = ReplayJudge(replay)
    outcomes = collect_outcomes(judge, judged.requests, None).outcomes
    ours = {(r["question_id"], r["turn"]): (r["judge"][1], r["score"]) for r in judged.rows(outcomes, judge).rows}
    assert ours == {(r["question_id"], r["turn"]): (r["judge_template"], r["score"]) for r in rows}
