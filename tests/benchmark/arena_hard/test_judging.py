"""Arena-Hard's two games, in both editions of its files."""

import json
from functools import partial

import pyarrow.parquet as pq
import pytest

from pipeline.benchmark.arena_hard.answers import ArenaAnswer, read_arena_answers
from pipeline.benchmark.arena_hard.battles import parse_verdict
from pipeline.benchmark.arena_hard.games import read_games
from pipeline.benchmark.arena_hard.judging import ArenaHardJudging, read_arena_template
from pipeline.benchmark.arena_hard.questions import ArenaQuestion, read_arena_questions
from pipeline.benchmark.judges.judge import Judgment, Unanswered
from pipeline.benchmark.judges.judge_prompt import JudgePrompt
from pipeline.errors import DataError
from tests.support.paths import SHARED_DATA

SHARED = SHARED_DATA / "arena_hard"
TEMPLATE = JudgePrompt(system="Be fair.", user="Q {QUESTION} A {ANSWER_A} B {ANSWER_B}")
QUESTIONS = [ArenaQuestion(question_id="u1", category="arena-hard-v0.1", prompt="why ?")]


class GPT:
    name, model = "https://somewhere", "gpt-x"


def answer(model, uid="u1", output="because"):
    return ArenaAnswer(question_id=uid, model=model, output=output, num_tokens=1)


def judging(questions=QUESTIONS, ours=None, theirs=None):
    return ArenaHardJudging(
        questions,
        ours or [answer("ours", output="{ANSWER_A} since")],
        theirs or [answer("gpt-4-0314", output="for")],
        TEMPLATE,
        parse=partial(parse_verdict, rules="v2"),
    )


def judgment_of(text):
    return Judgment(
        text=text, first_token_logprobs={}, finish_reason="stop", prompt_tokens=1, completion_tokens=1, time=0.0
    )


def test_both_orders_are_played_the_baseline_first():
    first, second = judging().requests
    assert first.messages == (
        {"role": "system", "content": "Be fair."},
        {"role": "user", "content": "Q why ? A for B {ANSWER_A} since"},
    )
    assert second.messages[1]["content"] == "Q why ? A {ANSWER_A} since B for"
    assert (first.pair.answer_a, second.pair.answer_a) == ("for", "{ANSWER_A} since")
    assert (first.sampling.temperature, first.sampling.max_tokens) == (0.0, 4096)


def test_judgments_have_upstreams_layout():
    judged = judging()
    result = judged.rows([judgment_of("I say [[B>>A]]"), judgment_of("[[a=b]]")], GPT())
    [row] = result.rows
    assert {name: row[name] for name in row if name != "games"} == {
        "uid": "u1",
        "category": "arena-hard-v0.1",
        "judge": "gpt-x",
        "model": "ours",
        "baseline": "gpt-4-0314",
    }
    assert row["games"][0] == {
        "score": "B>>A",
        "judgment": {"answer": "I say [[B>>A]]"},
        "prompt": [dict(message) for message in judged.requests[0].messages],
    }
    assert row["games"][1]["score"] == "A=B"
    assert result.unparsed == 0


def test_failed_games_stay_in_the_file_without_a_score():
    result = judging().rows([Unanswered(reason="HTTP 502"), judgment_of("no idea")], GPT())
    failed, unclear = result.rows[0]["games"]
    assert (failed["score"], failed["judgment"], failed["failure"]) == (None, None, "HTTP 502")
    assert (unclear["score"], unclear["judgment"]) == (None, {"answer": "no idea"})
    assert result.unparsed == 1


def test_the_scorer_reads_what_is_written(tmp_path):
    questions = [ArenaQuestion(question_id=f"u{i}", category="c", prompt=str(i)) for i in range(3)]
    judged = judging(
        questions,
        [answer("ours", q.question_id, f"o{q.question_id}") for q in questions],
        [answer("base", q.question_id, f"b{q.question_id}") for q in questions],
    )
    texts = ["[[B>>A]]", "[[A>B]]", "[[A>B]]", "[[A=B]]", "none", "[[A>B]]"]
    path = tmp_path / "ours.jsonl"
    rows = judged.rows([judgment_of(text) for text in texts], GPT()).rows
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    games = read_games([str(path)], baseline="base")
    assert [(b.question_id, b.outcome, b.weight) for b in games.battles] == [
        ("u0", 0.0, 3),
        ("u0", 0.0, 1),
        ("u1", 1.0, 1),
        ("u1", 0.5, 1),
    ]
    assert games.failures == {"ours": 1}


def test_a_question_without_an_answer_is_named():
    with pytest.raises(
        DataError, match=r"the baseline's answers of base, which end at .*, lack 1 of 2 questions, as u1"
    ):
        judging(
            [*QUESTIONS, ArenaQuestion(question_id="u2", category="c", prompt="how ?")],
            ours=[answer("ours"), answer("ours", "u2")],
            theirs=[answer("base", "u2")],
        )


def answer_line(uid="u1", model="ours"):
    content = {"role": "assistant", "content": {"answer": "because"}}
    return json.dumps({"uid": uid, "model": model, "messages": [content], "metadata": {"token_len": 1}})


@pytest.mark.parametrize(
    ("second", "letter"),
    [
        (answer_line(model="other"), "line 2: other among the answers of ours"),
        (answer_line(), "line 2: ours answers question u1 again, as in .*a.jsonl, line 1"),
        (answer_line("u9"), "line 2: ours answers question u9, which is not among the 1 questions"),
        (answer_line()[:-9], "line 2: no JSON"),
    ],
)
def test_an_answer_that_does_not_belong_is_named_by_its_line(tmp_path, second, letter):
    (tmp_path / "a.jsonl").write_text(f"{answer_line()}\n{second}\n")
    with pytest.raises(DataError, match=rf"a\.jsonl, {letter}"):
        judging(ours=read_arena_answers([str(tmp_path / "a.jsonl")]))


def test_no_answers_are_refused():
    with pytest.raises(DataError, match="there are no answers"):
        ArenaHardJudging(QUESTIONS, [], [answer("base")], TEMPLATE, parse=lambda text: None)


def test_a_question_given_twice_is_refused(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"uid": "u", "category": "c", "prompt": "why ?"}\n' * 2)
    with pytest.raises(DataError, match=r"q\.jsonl, line 2: question u is there already"):
        read_arena_questions(tmp_path / "q.jsonl")


def test_questions_of_both_editions_are_read(tmp_path):
    new = tmp_path / "new.jsonl"
    new.write_text('{"uid": "u", "category": "hard_prompt", "cluster": "x", "prompt": "why ?"}\n')
    old = tmp_path / "old.jsonl"
    old.write_text('{"question_id": "u", "category": "arena-hard-v0.1", "turns": [{"content": "why ?"}]}\n')
    [question] = read_arena_questions(new)
    assert question == ArenaQuestion(question_id="u", category="hard_prompt", prompt="why ?")
    assert read_arena_questions(old)[0].prompt == "why ?"


@pytest.mark.parametrize("turns", [[], [{"content": "a"}, {"content": "b"}], [{}]])
def test_a_question_of_no_or_two_turns_is_refused(tmp_path, turns):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question_id": "u", "category": "c", "turns": turns}) + "\n")
    with pytest.raises(DataError, match=r"q\.jsonl, line 1, field 'turns'"):
        read_arena_questions(path)


def test_templates_of_both_editions_are_read(tmp_path):
    path = tmp_path / "judge.yaml"
    path.write_text('system_prompt: Be fair.\nprompt_template: ["{question_1} / {answer_1} / {answer_2}"]\n')
    old = read_arena_template(path)
    path.write_text('system_prompt: Be fair.\nprompt_template: "{QUESTION} / {ANSWER_A} / {ANSWER_B}"\n')
    new = read_arena_template(path)
    both = [
        ArenaHardJudging(QUESTIONS, [answer("o", output="x")], [answer("b", output="y")], template, parse=lambda t: t)
        for template in (old, new)
    ]
    assert [judged.requests[0].messages[1]["content"] for judged in both] == ["why ? / y / x"] * 2
    assert both[0].requests == both[1].requests


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ('prompt_template: "{QUESTION} {ANSWER_A} {ANSWER_B}"', "system_prompt"),
        ('system_prompt: a\nprompt_template: "{QUESTION} {ANSWER_A}"', r"\{ANSWER_B\}"),
        ("system_prompt: a\nprompt_template: [a, b]", "one text each"),
        ("[", "not a template"),
        ("3", "not a template"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(tmp_path, text, letter):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(DataError, match=letter):
        read_arena_template(tmp_path / "t.yaml")


def test_the_public_questions_and_answers_make_a_thousand_games():
    if not SHARED.exists():
        pytest.skip("the public data beside the project is not here")
    rows = pq.read_table(SHARED / "model_answer.parquet").to_pylist()
    outputs = [
        answer(row["model"], row["uid"], json.loads(row["messages"])[-1]["content"]["answer"])
        for row in rows
        if row["model"] in ("gpt-4-0613", "gpt-4-0314")
    ]
    questions = read_arena_questions(SHARED / "question.jsonl")
    judged = judging(
        questions,
        [o for o in outputs if o.model == "gpt-4-0613"],
        [o for o in outputs if o.model == "gpt-4-0314"],
    )
    assert len(judged.requests) == 1000
    for first, second in zip(judged.requests[::2], judged.requests[1::2], strict=True):
        assert first.pair.answer_a == second.pair.answer_b
        assert first.pair.answer_b == second.pair.answer_a


def test_a_baseline_is_not_judged_against_itself():
    with pytest.raises(DataError, match="are both of 'gpt-4-0314': a model has no win rate over itself"):
        judging(ours=[answer("gpt-4-0314", output="since")])
