"""The answers of several policies to the same prompts."""

import pytest

from pipeline.benchmark.policy_comparison.contest import (
    answer_summaries,
    build_contest,
    mean_contributions,
)
from pipeline.errors import DataError
from pipeline.evaluation.reasons import UNVERIFIED
from tests.benchmark.policy_comparison.policies import ALIGNED, BASE, TWO, answers_of


def test_reward_length_and_style_are_means_over_answers():
    summary = answer_summaries(TWO)["aligned"]
    assert summary["reward"] == 1.5
    assert (summary["words"], summary["headers"], summary["list_items"], summary["bold"]) == (6, 1, 2, 1)


def test_mean_contributions_add_up_to_the_difference_of_the_mean_rewards():
    objectives = ("helpfulness", "honesty")
    # Mean rewards 1.5 and 1 of the first policy.
    assert mean_contributions(TWO, objectives, objectives) == {
        "aligned": [("helpfulness", 0.25 * 0.5), ("honesty", 0.75 * 0.5)]
    }
    assert mean_contributions(TWO, objectives, ("honesty",)) == {
        "aligned": [("honesty", 0.75 * 0.5), (UNVERIFIED, 0.25 * 0.5)]
    }
    assert mean_contributions(TWO, objectives, ()) == {"aligned": []}  # nothing verified, nothing named
    assert mean_contributions(TWO, (), ()) == {"aligned": []}
    bare_first = build_contest([answers_of("bare", []), ALIGNED])
    assert mean_contributions(bare_first, objectives, objectives) == {}


def test_only_prompts_that_all_answered_are_compared_and_the_others_counted():
    third = answers_of("third", [0.0, 0.0, 0.0], prompts=("q", "s", "elsewhere"))
    found = build_contest([BASE, ALIGNED, third])
    assert found.prompts == ("q", "s")
    assert found.left_out == {"p", "r", "elsewhere"}


@pytest.mark.parametrize(
    ("files", "letter"),
    [
        ([BASE], "only 'base' has AlpacaEval answers, so there is nothing to compare them with"),
        ([BASE, BASE], "two files hold AlpacaEval answers of 'base'"),
        ([BASE, answers_of("other", [0.0], prompts=("t",))], "no AlpacaEval prompt is answered by all of base, other"),
    ],
)
def test_files_that_cannot_be_compared_are_refused(files, letter):
    with pytest.raises(DataError, match=letter):
        build_contest(files)
