import json

import pytest

from pipeline.benchmark.comparison_page import comparison_page, contest, summaries, win_matrix, worst_losses_first
from pipeline.errors import DataError
from pipeline.records import Answer, RewardScore


def answers_of(generator, rewards, *, prompts=("p", "q", "r", "s"), output="an answer"):
    return [
        Answer(
            prompt_id=prompt,
            instruction=prompt,
            output=output,
            generator=generator,
            score=RewardScore(mean=reward, std=0.5, objective_weights=(0.25, 0.75), objective_scores=(reward, reward)),
        )
        for prompt, reward in zip(prompts, rewards, strict=True)
    ]


BASE = answers_of("base", [1.0, 1.0, 1.0, 1.0])
ALIGNED = answers_of("aligned", [2.0, 0.0, 1.0, 3.0], output="# Title\n- one\n- **two**")


def test_a_tie_is_half_a_win_and_both_directions_add_up():
    matrix = win_matrix(contest([BASE, ALIGNED]))
    assert matrix["aligned"]["base"]["win_rate"] == 2.5 / 4
    assert matrix["base"]["aligned"]["win_rate"] == 1.5 / 4
    assert matrix["aligned"].keys() == {"base"}


def test_the_prompts_where_the_last_policy_loses_most_come_first():
    assert worst_losses_first(contest([BASE, ALIGNED])) == [1, 2, 0, 3]


def test_reward_length_and_style_are_means_over_answers():
    summary = summaries(contest([BASE, ALIGNED]))["aligned"]
    assert summary["reward"] == 1.5
    assert (summary["words"], summary["header_count"], summary["list_count"], summary["bold_count"]) == (6, 1, 2, 1)


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
        ([BASE + ALIGNED, ALIGNED], "holds 2 generators"),
        ([BASE + BASE[:1], ALIGNED], "answers some instruction twice"),
        ([BASE, answers_of("other", [0.0], prompts=("t",))], "no instruction is answered by all of base, other"),
    ],
)
def test_files_that_cannot_be_compared_are_refused(files, letter):
    with pytest.raises(DataError, match=letter):
        contest(files)


def test_the_page_fetches_nothing_and_answers_cannot_run_in_it():
    hostile = answers_of("hostile", [0.0] * 4, output="<script>alert('x')</script><img src=http://elsewhere/a.png>")
    page = comparison_page(contest([BASE, hostile]), objectives=("helpfulness", "honesty"))
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert page.count("<script>") == 1
    assert not any(f'{attribute}="http' in page for attribute in ("src", "href"))
    assert "helpfulness +0.25" in page
    assert "honesty +0.75" in page


def test_wrong_names_of_objectives_are_refused():
    with pytest.raises(DataError, match="1 objectives are named, 'base' was scored on 2"):
        comparison_page(contest([BASE, ALIGNED]), objectives=("helpfulness",))


def test_the_job_reads_what_the_benchmark_wrote(tmp_path, monkeypatch, capsys):
    from jobs import compare_policies
    from pipeline.benchmark.answers import write_answers

    for name, answers in (("base", BASE), ("aligned", ALIGNED)):
        write_answers(tmp_path / name / "model_outputs.json", answers, dataset="test")
    files = [str(tmp_path / name / "model_outputs.json") for name in ("base", "aligned")]
    out = tmp_path / "page" / "comparison.html"
    monkeypatch.setattr("sys.argv", ["compare_policies", *files, "--out", str(out)])
    compare_policies.main()
    assert "62.5" in out.read_text()
    assert str(out) in capsys.readouterr().out

    (tmp_path / "bare.json").write_text(json.dumps([{"instruction": "p", "output": "x", "generator": "y"}]))
    monkeypatch.setattr("sys.argv", ["compare_policies", files[0], str(tmp_path / "bare.json"), "--out", str(out)])
    with pytest.raises(SystemExit, match="2"):
        compare_policies.main()
    assert "bare.json holds no scored answers" in capsys.readouterr().err
