import json

import pytest

from pipeline.benchmark.alpaca_eval import Annotations
from pipeline.benchmark.answers import write_answers
from pipeline.benchmark.comparison_page import (
    PolicyAnswers,
    breakdown,
    comparison_page,
    contest,
    judged_verdicts,
    mean_contributions,
    orders,
    read_categories,
    read_policy,
    reward_verdicts,
    summaries,
    win_matrix,
)
from pipeline.errors import DataError
from pipeline.records import Answer, RewardScore


def score(reward):
    return RewardScore(mean=reward, std=0.5, objective_weights=(0.25, 0.75), objective_scores=(reward, reward))


def answers_of(policy, rewards, *, prompts=("p", "q", "r", "s"), output="an answer", categories=()):
    return PolicyAnswers(
        policy=policy,
        outputs=dict.fromkeys(prompts, output),
        rewards={prompt: score(reward) for prompt, reward in zip(prompts, rewards, strict=False)},
        categories=dict(zip(prompts, categories, strict=False)),
    )


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
        ([judged([1.0], prompts=("elsewhere",))], "1 instructions .* are not answered by all policies, as 'elsewhere'"),
        ([judged([1.0] * 4)] * 2, "'gpt' compares 'aligned' with 'base' in two files"),
    ],
)
def test_judgments_of_something_else_are_refused(files, letter):
    with pytest.raises(DataError, match=letter):
        judged_verdicts(TWO, files)


def test_every_category_and_every_relation_of_lengths_has_its_win_rate():
    base = answers_of("base", [1.0] * 4, output="one two three four five", categories=("x", "x", "y"))
    texts = {"p": "one", "q": "1 2 3 4 5", "r": "1 2 3 4 5 6 7", "s": "1 2 3 4 5 6"}
    ours = PolicyAnswers(policy="ours", outputs=texts, rewards=dict.fromkeys(texts, score(2.0)), categories={})
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
    page = comparison_page(TWO)
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
    assert found.left_out == 3


@pytest.mark.parametrize(
    ("files", "letter"),
    [
        ([BASE], "1 policies cannot be compared"),
        ([BASE, BASE], "two files hold answers of 'base'"),
        ([BASE, answers_of("other", [0.0], prompts=("t",))], "no instruction is answered by all of base, other"),
    ],
)
def test_files_that_cannot_be_compared_are_refused(files, letter):
    with pytest.raises(DataError, match=letter):
        contest(files)


def test_a_category_comes_by_prompt_id_by_instruction_or_from_the_answers_file(tmp_path):
    answers = [
        Answer(prompt_id=f"id-{text}", instruction=text, output="x", generator="a", score=score(1.0)) for text in "pqr"
    ]
    write_answers(tmp_path / "model_outputs.json", answers, dataset="koala")
    found = read_policy(tmp_path / "model_outputs.json", {"id-p": "plan", "q": "quick"})
    assert found.categories == {"p": "plan", "q": "quick", "r": "koala"}
    assert found.rewards["p"] == score(1.0)


def test_categories_are_read_from_the_planted_world_and_from_question_files(tmp_path):
    (tmp_path / "planted.json").write_text(json.dumps({"kinds": {"id": "plan"}, "weights": {}}))
    assert read_categories(tmp_path / "planted.json") == {"id": "plan"}
    rows = [{"question_id": 81, "category": "writing"}, {"instruction": "why ?", "dataset": "koala"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_categories(tmp_path / "q.jsonl") == {"81": "writing", "why ?": "koala"}
    (tmp_path / "q.jsonl").write_text('{"category": "writing"}\n')
    with pytest.raises(DataError, match=r"q\.jsonl, line 1: no uid"):
        read_categories(tmp_path / "q.jsonl")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(DataError, match=r"other\.json holds no kinds"):
        read_categories(tmp_path / "other.json")


# ----------------------------------------------------------------------------- the page


def test_the_page_fetches_nothing_and_answers_cannot_run_in_it():
    hostile = answers_of("hostile", [0.0] * 4, output="<script>alert('x')</script><img src=http://elsewhere/a.png>")
    page = comparison_page(contest([BASE, hostile]), objectives=("helpfulness", "honesty"))
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert page.count("<script>") == 1
    assert not any(f'{attribute}="http' in page for attribute in ("src", "href"))
    assert "helpfulness 0.25 × 1.00 = +0.25" in page
    assert "honesty 0.75 × 1.00 = +0.75" in page


def test_answers_that_nobody_scored_can_be_read_and_judged():
    bare = contest([answers_of("base", []), answers_of("aligned", [])])
    assert "Nobody has judged these answers" in comparison_page(bare)
    page = comparison_page(bare, judged=[judged([2.0, 2.0, 2.0, 1.5])])
    assert "Judge: gpt" in page
    assert "87.5" in page
    assert "P(aligned beats base) = 0.50" in page


def test_a_policy_without_rewards_among_others_is_named():
    page = comparison_page(contest([BASE, ALIGNED, answers_of("bare", [])]))
    assert "No rewards came with the answers of bare." in page


def test_wrong_names_of_objectives_are_refused():
    with pytest.raises(DataError, match="1 objectives are named, 'base' was scored on 2"):
        comparison_page(TWO, objectives=("helpfulness",))


def test_the_job_reads_what_the_benchmark_wrote(tmp_path, monkeypatch, capsys):
    from jobs import compare_policies

    for name, rewards in (("base", [1.0, 1.0]), ("aligned", [2.0, 1.0])):
        answers = [
            Answer(prompt_id=text, instruction=text, output="x", generator=name, score=score(reward))
            for text, reward in zip("pq", rewards, strict=True)
        ]
        write_answers(tmp_path / name / "model_outputs.json", answers, dataset="test")
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
