import dataclasses
import json

import pyarrow.parquet as pq
import pytest

from pipeline.benchmark.alpaca_eval.annotations import Annotations
from pipeline.benchmark.arena_hard.battles import Battle
from pipeline.benchmark.arena_hard.games import Games, read_games
from pipeline.benchmark.arena_hard.win_rates import bradley_terry_win_rates as arena_hard_win_rate
from pipeline.benchmark.mt_bench import grades as mt_bench
from pipeline.benchmark.policy_comparison.contest import (
    breakdown,
    contest,
    contests,
    difference_over_shared_opponent,
    game_verdicts,
    grade_verdicts,
    judged_verdicts,
    mean_contributions,
    reward_verdicts,
    summaries,
    win_matrix,
)
from pipeline.benchmark.policy_comparison.contest_files import (
    Judgments,
    PolicyAnswers,
    Questions,
    answer_files,
    read_judgments,
    read_policy,
    read_questions,
)
from pipeline.benchmark.policy_comparison.contest_page import comparison_page, judged_contests, orders
from pipeline.benchmark.scored_answers import write_scored_answers
from pipeline.errors import DataError
from pipeline.records import Answer, RewardScore
from tests.support.paths import SHARED_DATA

NO_QUESTIONS = Questions(turns={}, categories={})


def score(reward):
    return RewardScore(mean=reward, std=0.5, objective_weights=(0.25, 0.75), objective_scores=(reward, reward))


def answers_of(policy, rewards, *, prompts=("p", "q", "r", "s"), output="an answer", categories=(), **changes):
    answers = PolicyAnswers(
        benchmark="alpaca_eval",
        policy=policy,
        turns={prompt: (prompt,) for prompt in prompts},
        outputs=dict.fromkeys(prompts, (output,)),
        rewards={prompt: score(reward) for prompt, reward in zip(prompts, rewards, strict=False)},
        categories=dict(zip(prompts, categories, strict=False)),
    )
    return dataclasses.replace(answers, **changes)


def page_of(contest, annotations=(), **more):
    given = Judgments(annotations=annotations, games=(), grades=())
    return comparison_page(judged_contests([contest], given), **more)


def judged(preferences, *, model="aligned", baseline="base", prompts=("p", "q", "r", "s"), judge="gpt"):
    lengths = [1] * len(prompts)
    return Annotations(
        baseline=baseline,
        model=model,
        instructions=prompts,
        preferences=preferences,
        baseline_lengths=lengths,
        model_lengths=lengths,
        judge=judge,
    )


BASE = answers_of("base", [1.0, 1.0, 1.0, 1.0])
ALIGNED = answers_of("aligned", [2.0, 0.0, 1.0, 3.0], output="# Title\n- one\n- **two**")
TWO = contest([BASE, ALIGNED])


# ----------------------------------------------------------------------------- who wins


def test_a_tie_is_half_a_win_and_both_directions_add_up():
    [verdicts] = reward_verdicts(TWO)
    matrix = win_matrix(TWO, verdicts)
    assert matrix["aligned"]["base"]["win_rate"] == 2.5 / 4
    assert matrix["base"]["aligned"]["win_rate"] == 1.5 / 4
    assert matrix["aligned"].keys() == {"base"}


def test_length_and_style_stand_beside_every_win_rate():
    # "# Title / - one / - **two**" has 6 words, a header, two list items and a bold span; "an answer" 2 words.
    [verdicts] = reward_verdicts(TWO)
    cell = win_matrix(TWO, verdicts)["aligned"]["base"]
    assert (cell["n"], cell["words"], cell["markdown"]) == (4, 4, 4)


def test_the_win_rate_of_judgments_is_alpaca_evals():
    [verdicts] = judged_verdicts(TWO, [judged([1.25, 2.0, 0, None])])
    cell = win_matrix(TWO, verdicts)["aligned"]["base"]
    assert verdicts.judge == "gpt"
    assert (cell["n"], cell["ties"]) == (3, 1 / 3)
    assert cell["win_rate"] == pytest.approx((0.25 + 1.0 + 0.5) / 3)
    assert win_matrix(TWO, verdicts)["base"]["aligned"]["win_rate"] == pytest.approx(1.25 / 3)


def test_judgments_are_joined_by_instruction():
    [verdicts] = judged_verdicts(TWO, [judged([2.0, 1.0], prompts=("s", "p"))])
    assert verdicts.pairs["aligned", "base"] == [0.0, None, None, 1.0]


@pytest.mark.parametrize(
    ("files", "letter"),
    [
        ([judged([1.0] * 4, baseline="gpt-4")], "there are no answers of 'gpt-4'"),
        ([judged([1.0], prompts=("elsewhere",))], "1 prompts that none of the policies answered, as 'elsewhere'"),
        ([judged([1.0] * 4)] * 2, "'gpt' compares 'aligned' with 'base' in two files"),
    ],
)
def test_judgments_of_something_else_are_refused(files, letter):
    with pytest.raises(DataError, match=letter):
        judged_verdicts(TWO, files)


def test_every_category_and_every_relation_of_lengths_has_its_win_rate():
    base = answers_of("base", [1.0] * 4, output="one two three four five", categories=("x", "x", "y"))
    texts = {"p": "one", "q": "1 2 3 4 5", "r": "1 2 3 4 5 6 7", "s": "1 2 3 4 5 6"}
    outputs = {prompt: (text,) for prompt, text in texts.items()}
    ours = answers_of("ours", [2.0] * 4, outputs=outputs)
    both = contest([base, ours])
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
    same = contest([answers_of(name, [1.0] * 4, categories=("x",) * 4) for name in ("a", "b")])
    [verdicts] = reward_verdicts(same)
    groups = dict(breakdown(same, verdicts, ("b", "a")))
    assert "x" not in groups
    assert groups["its answer is longer"] == {"n": 0}


def test_the_prompts_where_the_last_policy_loses_most_come_first():
    [order] = orders(TWO, reward_verdicts(TWO))
    assert (order.policy, order.other) == ("aligned", "base")
    assert list(order.margins) == [1.0, -1.0, 0.0, 2.0]
    page = page_of(TWO)
    places = [page.index(f'<div class="prompt">{prompt}</div>') for prompt in "qrps"]
    assert places == sorted(places)


def test_prompts_can_be_ordered_by_every_judge_and_policy():
    three = contest([BASE, ALIGNED, answers_of("third", [0.0] * 4)])
    verdicts = [*reward_verdicts(three), *judged_verdicts(three, [judged([1.0] * 4)])]
    found = [(order.judge, order.policy) for order in orders(three, verdicts)]
    assert found == [("reward model", "third"), ("reward model", "aligned"), ("gpt", "aligned")]


# ----------------------------------------------------------------------------- what is compared


def test_reward_length_and_style_are_means_over_answers():
    summary = summaries(TWO)["aligned"]
    assert summary["reward"] == 1.5
    assert (summary["words"], summary["headers"], summary["list_items"], summary["bold"]) == (6, 1, 2, 1)


def test_mean_contributions_add_up_to_the_mean_reward():
    parts = mean_contributions(TWO, ("helpfulness", "honesty"))["aligned"]
    assert parts == [("helpfulness", 0.25 * 1.5), ("honesty", 0.75 * 1.5)]


def test_only_prompts_that_all_answered_are_compared_and_the_others_counted():
    third = answers_of("third", [0.0, 0.0, 0.0], prompts=("q", "s", "elsewhere"))
    found = contest([BASE, ALIGNED, third])
    assert found.prompts == ("q", "s")
    assert found.left_out == {"p", "r", "elsewhere"}


@pytest.mark.parametrize(
    ("files", "letter"),
    [
        ([BASE], "only 'base' has AlpacaEval answers, and nothing to be compared with"),
        ([BASE, BASE], "two files hold AlpacaEval answers of 'base'"),
        ([BASE, answers_of("other", [0.0], prompts=("t",))], "no AlpacaEval prompt is answered by all of base, other"),
    ],
)
def test_files_that_cannot_be_compared_are_refused(files, letter):
    with pytest.raises(DataError, match=letter):
        contest(files)


def test_a_category_comes_by_prompt_id_by_instruction_or_from_the_answers_file(tmp_path):
    answers = [
        Answer(prompt_id=f"id-{text}", instruction=text, output="x", generator="a", score=score(1.0)) for text in "pqr"
    ]
    write_scored_answers(tmp_path / "model_outputs.json", answers, dataset="koala")
    questions = Questions(turns={}, categories={"id-p": "plan", "q": "quick"})
    found = read_policy(tmp_path / "model_outputs.json", questions)
    assert found.categories == {"p": "plan", "q": "quick", "r": "koala"}
    assert found.rewards["p"] == score(1.0)


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ARENA_QUESTION = {"uid": "u1", "category": "hard", "prompt": "prove it"}
MT_QUESTION = {"question_id": 81, "category": "writing", "turns": ["write", "write again"]}


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
        ("q.jsonl", '{"category": "writing"}\n', r"q\.jsonl, line 1: no question"),
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


def arena_answer(model, uid="u1", output="proof"):
    said = {"role": "assistant", "content": {"answer": output}}
    return {"uid": uid, "model": model, "messages": [said], "metadata": {"token_len": 1}}


def mt_answer(model, number=81, turns=("first", "second")):
    return {"question_id": number, "model_id": model, "choices": [{"index": 0, "turns": turns}]}


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
        answers += [read_policy(file, questions) for file in answer_files(home)]
    found = {of.benchmark: of for of in contests(answers)}
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
        read_policy(lines(tmp_path / "a.jsonl", *rows), questions)


def test_answers_without_what_was_asked_need_the_questions(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl does not hold what was asked\. Give .* as --questions"):
        read_policy(lines(tmp_path / "a.jsonl", mt_answer("m")), NO_QUESTIONS)
    with pytest.raises(DataError, match="holds no answers: none of model_outputs"):
        answer_files(tmp_path)


def test_a_file_of_no_benchmarks_judgments_is_named(tmp_path):
    with pytest.raises(DataError, match=r"j\.jsonl, line 1: no judgment of AlpacaEval"):
        read_judgments([lines(tmp_path / "j.jsonl", {"verdict": "A"})])


# ----------------------------------------------------------------------------- Arena-Hard and MT-Bench


def arena(*policies):
    return contest([answers_of(policy, [], benchmark="arena_hard") for policy in policies])


def game(question_id, outcome, weight=1, model="m"):
    return Battle(question_id=question_id, model_a="base", model_b=model, outcome=outcome, weight=weight)


def test_arena_hards_win_rate_is_its_own_a_clear_win_three_times():
    # p: the model wins clearly and draws: 3.5 of 4; q: it loses twice; r and s were not decided.
    battles = [game("p", 0.0, 3), game("p", 0.5), game("q", 1.0), game("q", 1.0)]
    [verdicts] = game_verdicts(arena("base", "m"), [Games(battles=battles, judges=("gpt",), failures={})])
    assert verdicts.pairs["m", "base"] == [3.5 / 4, 0.0, None, None]
    cell = win_matrix(arena("base", "m"), verdicts)["m"]["base"]
    assert cell["win_rate"] == pytest.approx(3.5 / 6)
    assert 100 * cell["win_rate"] == pytest.approx(arena_hard_win_rate(battles, "base")["m"]["win_rate"], abs=1e-4)
    assert win_matrix(arena("base", "m"), verdicts)["base"]["m"]["win_rate"] == pytest.approx(2.5 / 6)


def test_the_public_battles_of_arena_hard_show_their_leaderboard():
    file = SHARED_DATA / "arena_hard" / "battles_official_models_gpt4-1106-judge.jsonl"
    if not file.exists():
        pytest.skip("needs the public data folder beside the checkout")
    rows = pq.read_table(SHARED_DATA / "arena_hard" / "model_answer.parquet", columns=["uid", "model"]).to_pylist()
    by_model = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row["uid"])
    of = contest([answers_of(model, [], prompts=uids, benchmark="arena_hard") for model, uids in by_model.items()])
    [verdicts] = game_verdicts(of, [read_games([str(file)], baseline="gpt-4-0314")])
    matrix = win_matrix(of, verdicts)
    assert 100 * matrix["gpt-4-0613"]["gpt-4-0314"]["win_rate"] == pytest.approx(37.90, abs=0.005)
    assert 100 * matrix["gpt-3.5-turbo-0125"]["gpt-4-0314"]["win_rate"] == pytest.approx(23.34, abs=0.005)
    third, gap = difference_over_shared_opponent(verdicts, ("gpt-4-0613", "gpt-3.5-turbo-0125"))
    assert third == "gpt-4-0314"
    assert 100 * gap["difference"] == pytest.approx(37.90 - 23.34, abs=0.05)
    assert 0.05 < gap["low"] < gap["difference"] < gap["high"] < 0.24


def grade(model, number, turn, value, judge="gpt-4"):
    return mt_bench.TurnGrade(
        question_id=number,
        model=model,
        judge=judge,
        template="single-v1",
        turn=turn,
        user_prompt="?",
        judgment="[[..]]",
        score=value,
    )


def graded():
    two_turns = {str(number): ("a", "b") for number in (81, 82, 83)}
    return contest(
        [answers_of(name, [], benchmark="mt_bench", turns=two_turns, outputs=two_turns) for name in ("base", "m")]
    )


def grades_of(model, *pairs):
    return [grade(model, 81 + i, turn + 1, value) for i, pair in enumerate(pairs) for turn, value in enumerate(pair)]


def test_the_higher_mean_grade_of_both_turns_wins_and_a_missing_grade_is_no_verdict():
    rows = [*grades_of("base", (5, 5), (8, 6), (9, 9)), *grades_of("m", (3, 9), (7, 7), (10, -1))]
    [verdicts] = grade_verdicts(graded(), rows)
    assert verdicts.pairs["m", "base"] == [1.0, 0.5, None]
    assert verdicts.margins["m", "base"] == [1.0, 0.0, 0.0]
    assert verdicts.grades["m"] == [(3, 9), (7, 7), (10, None)]


def test_mt_bench_shows_both_turns_their_grades_and_the_means_by_category():
    rows = [*grades_of("base", (5, 5), (8, 6), (9, 9)), *grades_of("m", (3, 9), (7, 7), (10, -1))]
    page = comparison_page(judged_contests([graded()], Judgments(annotations=(), games=(), grades=rows)))
    assert "<b>7.20</b>" in page  # (3 + 9 + 7 + 7 + 10) / 5
    assert page.index("no grade by gpt-4") > page.index("<b>10</b> by gpt-4")
    assert page.count('<div class="prompt">a</div>') == page.count('<div class="prompt">b</div>') == 3


@pytest.mark.parametrize(
    ("rows", "letter"),
    [
        ([grade("other", 81, 1, 5)], "grades turn 1 of question 81 by 'other', and there are no answers"),
        ([grade("m", 99, 2, 5)], "question 99 by 'm', a question that none of the policies answered"),
        ([grade("m", 81, 1, 5)] * 2, "'gpt-4' grades turn 1 of question 81 by 'm' in two files"),
    ],
)
def test_grades_of_something_else_are_refused(rows, letter):
    with pytest.raises(DataError, match=letter):
        grade_verdicts(graded(), rows)


def test_judgments_of_a_benchmark_without_answers_are_refused():
    with pytest.raises(DataError, match="judgments of MT-Bench, and no answers"):
        judged_contests([TWO], Judgments(annotations=(), games=(), grades=[grade("m", 81, 1, 5)]))


def test_two_that_only_met_a_third_are_compared_over_it_prompt_by_prompt():
    three = contest([BASE, ALIGNED, answers_of("third", [])])
    files = [judged([2.0, 2.0, 1.0, None]), judged([2.0, 1.5, 1.0, 1.0], model="third")]
    [verdicts] = judged_verdicts(three, files)
    # On p, q, r: 1, 1, 0 against 1, 1/2, 0; differences 0, 1/2, 0 with mean 1/6 and standard deviation sqrt(1/12).
    other, gap = difference_over_shared_opponent(verdicts, ("aligned", "third"))
    assert other == "base"
    assert gap["difference"] == pytest.approx(1 / 6)
    assert gap["high"] - gap["low"] == pytest.approx(2 * 1.959964 * (1 / 12) ** 0.5 / 3**0.5)
    assert "+16.7" in page_of(three, files)


# ----------------------------------------------------------------------------- the page


def test_the_page_fetches_nothing_and_answers_cannot_run_in_it():
    hostile = answers_of("hostile", [0.0] * 4, output="<script>alert('x')</script><img src=http://elsewhere/a.png>")
    page = page_of(contest([BASE, hostile]), objectives=("helpfulness", "honesty"))
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert page.count("<script>") == 1
    assert not any(f'{attribute}="http' in page for attribute in ("src", "href"))
    assert "helpfulness 0.25 × 1.00 = +0.25" in page
    assert "honesty 0.75 × 1.00 = +0.75" in page


def test_answers_that_nobody_scored_can_be_read_and_judged():
    bare = contest([answers_of("base", []), answers_of("aligned", [])])
    assert "Nobody has judged these answers" in page_of(bare)
    page = page_of(bare, [judged([2.0, 2.0, 2.0, 1.5])])
    assert "Judge: gpt" in page
    assert "87.5" in page
    assert "gpt: aligned wins 0.50 against base" in page


def test_a_policy_without_rewards_among_others_is_named():
    page = page_of(contest([BASE, ALIGNED, answers_of("bare", [])]))
    assert "No rewards came with the answers of bare." in page


def test_wrong_names_of_objectives_are_refused():
    with pytest.raises(DataError, match="1 objectives are named, 'base' was scored on 2"):
        page_of(TWO, objectives=("helpfulness",))


def test_the_job_reads_what_the_benchmark_wrote(tmp_path, monkeypatch, capsys):
    from jobs import compare_policies

    for name, rewards in (("base", [1.0, 1.0]), ("aligned", [2.0, 1.0])):
        answers = [
            Answer(prompt_id=text, instruction=text, output="x", generator=name, score=score(reward))
            for text, reward in zip("pq", rewards, strict=True)
        ]
        write_scored_answers(tmp_path / name / "model_outputs.json", answers, dataset="test")
    files = [str(tmp_path / name / "model_outputs.json") for name in ("base", "aligned")]
    out = tmp_path / "page" / "comparison.html"
    monkeypatch.setattr("sys.argv", ["compare_policies", *files, "--out", str(out)])
    compare_policies.main()
    assert "75.0" in out.read_text()
    assert str(out) in capsys.readouterr().out

    (tmp_path / "bare.json").write_text(json.dumps([{"instruction": "p", "generator": "y"}]))
    monkeypatch.setattr("sys.argv", ["compare_policies", files[0], str(tmp_path / "bare.json"), "--out", str(out)])
    with pytest.raises(SystemExit, match="2"):
        compare_policies.main()
    assert "bare.json, row 1 (line 1), field 'output'" in capsys.readouterr().err
