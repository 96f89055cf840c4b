"""The page that compares policies."""

import json

import pytest

from pipeline.benchmark.policy_comparison.contest import (
    build_contest,
)
from pipeline.benchmark.policy_comparison.judgment_files import Judgments
from pipeline.benchmark.policy_comparison.verdicts import (
    judged_verdicts,
    reward_verdicts,
)
from pipeline.benchmark.policy_comparison.win_matrix import difference_over_shared_opponent
from pipeline.benchmark.scored_answers import write_scored_answers
from pipeline.config.reward import VRMHeadConfig
from pipeline.errors import DataError
from pipeline.models.reward_model_card import CARD_FILE, RewardModelCard
from pipeline.records import Answer
from pipeline.reporting.comparison_page import comparison_page, judged_contests, prompt_orders
from tests.benchmark.policy_comparison.policies import (
    ALIGNED,
    BASE,
    TWO,
    answers_of,
    grade,
    graded,
    grades_of,
    judged,
    score,
)


def page_of(contest, annotations=(), **more):
    given = Judgments(annotations=annotations, games=(), grades=())
    return comparison_page(judged_contests([contest], given), **more)


def test_the_prompts_where_the_last_policy_loses_most_come_first():
    [order] = prompt_orders(TWO, reward_verdicts(TWO))
    assert (order.policy, order.other) == ("aligned", "base")
    assert list(order.margins) == [1.0, -1.0, 0.0, 2.0]
    page = page_of(TWO)
    places = [page.index(f'<div class="prompt">{prompt}</div>') for prompt in "qrps"]
    assert places == sorted(places)


def test_prompts_can_be_ordered_by_every_judge_and_policy():
    three = build_contest([BASE, ALIGNED, answers_of("third", [0.0] * 4)])
    verdicts = [*reward_verdicts(three), *judged_verdicts(three, [judged([1.0] * 4)])]
    found = [(order.judge, order.policy) for order in prompt_orders(three, verdicts)]
    assert found == [("reward model", "third"), ("reward model", "aligned"), ("gpt", "aligned")]


def test_mt_bench_shows_both_turns_their_grades_and_the_means_by_category():
    rows = [*grades_of("base", (5, 5), (8, 6), (9, 9)), *grades_of("m", (3, 9), (7, 7), (10, -1))]
    page = comparison_page(judged_contests([graded()], Judgments(annotations=(), games=(), grades=rows)))
    assert "<b>7.20</b>" in page  # (3 + 9 + 7 + 7 + 10) / 5
    assert page.index("no grade by gpt-4") > page.index("<b>10</b> by gpt-4")
    assert page.count('<div class="prompt">a</div>') == page.count('<div class="prompt">b</div>') == 3


def test_judgments_of_a_benchmark_without_answers_are_refused():
    with pytest.raises(DataError, match="judgments of MT-Bench, and no answers"):
        judged_contests([TWO], Judgments(annotations=(), games=(), grades=[grade("m", 81, 1, 5)]))


def test_two_that_only_met_a_third_are_compared_over_it_prompt_by_prompt():
    three = build_contest([BASE, ALIGNED, answers_of("third", [])])
    files = [judged([2.0, 2.0, 1.0, None]), judged([2.0, 1.5, 1.0, 1.0], model="third")]
    [verdicts] = judged_verdicts(three, files)
    # On p, q, r: 1, 1, 0 against 1, 1/2, 0; differences 0, 1/2, 0 with mean 1/6 and standard deviation sqrt(1/12).
    other, gap = difference_over_shared_opponent(verdicts, ("aligned", "third"))
    assert other == "base"
    assert gap["difference"] == pytest.approx(1 / 6)
    assert gap["high"] - gap["low"] == pytest.approx(2 * 1.959964 * (1 / 12) ** 0.5 / 3**0.5)
    assert "+16.7" in page_of(three, files)


def test_the_page_fetches_nothing_and_answers_cannot_run_in_it():
    hostile = answers_of("hostile", [0.0] * 4, output="<script>alert('x')</script><img src=http://elsewhere/a.png>")
    names = ("helpfulness", "honesty")
    page = page_of(build_contest([BASE, hostile]), objectives=names, verified=names)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert page.count("<script>") == 1
    assert not any(f'{attribute}="http' in page for attribute in ("src", "href"))
    # Rewards 0 against 1: an objective is told by what it adds above the first policy's answer, never by itself.
    assert page.count("helpfulness -0.25") == page.count("honesty -0.75") == 4


def test_answers_that_nobody_scored_can_be_read_and_judged():
    bare = build_contest([answers_of("base", []), answers_of("aligned", [])])
    assert "Nobody has judged these answers" in page_of(bare)
    page = page_of(bare, [judged([2.0, 2.0, 2.0, 1.5])])
    assert "Judge: gpt" in page
    assert "87.5" in page
    assert "gpt: aligned wins 0.50 against base" in page


def test_every_number_has_its_judge_and_the_kind_of_its_interval():
    page = page_of(TWO, [judged([2.0, 2.0, 2.0, 1.5])])
    for judge in ("reward model", "gpt"):
        assert f'<h3>Judge: {judge} <span class="soft">95% Wilson interval</span></h3>' in page
        assert f"aligned over base, judge: {judge}" in page
    assert page.count("preferred in, of 100 [95% Wilson interval]</th>") == 2
    assert "Means over answers, without an interval. The reward is that of the reward model" in page
    assert "+4.0 words, +4.0 markdown, 0 identical" in page


def test_a_policy_without_rewards_among_others_is_named():
    page = page_of(build_contest([BASE, ALIGNED, answers_of("bare", [])]))
    assert "No rewards came with the answers of bare." in page


def test_wrong_names_of_objectives_are_refused():
    with pytest.raises(DataError, match="1 objectives are named, 'aligned' was scored on 2"):
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
    compare_policies.compare_policies_command()
    assert "75.0" in out.read_text()
    assert str(out) in capsys.readouterr().out
    assert "is made of" not in out.read_text()  # without the reward model nobody knows what its objectives are

    card = RewardModelCard(
        head="gate",
        vrm=VRMHeadConfig(),
        objectives=("helpfulness", "honesty"),
        max_length=64,
        score_mean=(),
        score_std=(),
        reward_mean=0.0,
        reward_std=1.0,
        mean_contributions=(0.5, 0.5),
        metrics={"reasons/honesty/pair_accuracy": 0.8, "reasons/honesty/pairs": 100.0},
    )
    (tmp_path / CARD_FILE).write_text(card.model_dump_json())
    monkeypatch.setattr("sys.argv", ["compare_policies", *files, "--out", str(out), "--reward-model", str(tmp_path)])
    compare_policies.compare_policies_command()
    # Rewards 2 and 1 against 1 and 1, at weights 1/4 and 3/4; helpfulness is not verified.
    assert "honesty +0.75" in out.read_text()
    assert "what the model cannot tell apart +0.25" in out.read_text()
    assert '<td class="number" data-name="honesty">+0.375</td>' in out.read_text()
    assert '<td class="number" data-name="what the model cannot tell apart">+0.125</td>' in out.read_text()

    (tmp_path / "bare.json").write_text(json.dumps([{"instruction": "p", "generator": "y"}]))
    monkeypatch.setattr("sys.argv", ["compare_policies", files[0], str(tmp_path / "bare.json"), "--out", str(out)])
    with pytest.raises(SystemExit, match="2"):
        compare_policies.compare_policies_command()
    assert "bare.json, row 1 (line 1), field 'output'" in capsys.readouterr().err
