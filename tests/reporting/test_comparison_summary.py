"""What a comparison says to somebody who reads its first lines alone."""

from pipeline.benchmark.policy_comparison.contest import build_contest
from pipeline.benchmark.policy_comparison.verdicts import judged_verdicts, reward_verdicts
from pipeline.reporting.comparison_summary import comparison_summary, preferred_in_words
from tests.benchmark.policy_comparison.policies import answers_of, judged

PROMPTS = tuple(f"prompt {i}" for i in range(100))


def contest_of(rewards=(), *, output="an answer"):
    base = answers_of("base", [1.0] * len(rewards), prompts=PROMPTS)
    return build_contest([base, answers_of("aligned", rewards, prompts=PROMPTS, output=output)])


def lines(contest, wins):
    """Of a judge who prefers the aligned answer `wins` times."""
    preferences = [2.0] * wins + [1.0] * (100 - wins)
    return comparison_summary(contest, judged_verdicts(contest, [judged(preferences, prompts=PROMPTS)]))


def test_a_win_rate_in_plain_words():
    assert preferred_in_words({"win_rate": 0.54, "low": 0.489, "high": 0.59}) == (
        "preferred in 54 of 100, between 49 and 59"
    )


def test_a_judge_says_better_worse_or_that_it_is_not_known():
    contest = contest_of()
    better, worse, unknown = ([line] for wins in (70, 30, 54) for line in lines(contest, wins))
    assert [line.level for [line] in (better, worse, unknown)] == ["good", "bad", "unsure"]
    # Wilson: 70 of 100 between 60.4 and 78.1; 30 mirrors it; 54 between 44.3 and 63.4.
    assert better[0].text == (
        "aligned is better than base. By gpt its answers are preferred in 70 of 100, between 60 and 78."
    )
    assert worse[0].text.startswith("aligned is worse than base. By gpt its answers are preferred in 30 of 100")
    assert unknown[0].text == (
        "It is not known whether aligned is better than base. By gpt its answers are preferred in 54 of 100, between "
        "44 and 63. 50 of 100 would be no difference."
    )
    assert better[0].evidence == (
        "AlpacaEval, 100 prompts; 95% Wilson interval. 0% are ties, and a tie counts one half. 100 of the 100 pairs of "
        "answers are identical. 2 words an answer against 2."
    )


def test_the_reward_model_alone_is_no_proof():
    contest = contest_of([2.0] * 100)
    [line] = comparison_summary(contest, reward_verdicts(contest))
    assert line.level == "unsure"
    assert line.text.startswith("The reward model prefers aligned to base: its answers are preferred in 100 of 100")
    assert "that alone is no proof" in line.text
    [worse] = comparison_summary(worst := contest_of([0.0] * 100), reward_verdicts(worst))
    assert (worse.level, worse.text.split(".")[0]) == ("bad", "aligned is worse than base")
    assert "By the reward model its answers" in worse.text


def test_much_longer_answers_are_a_caution():
    assert "a preference for length" in lines(contest_of(output="one two three"), 70)[0].text
    assert "a preference for length" not in lines(contest_of(output="one two"), 70)[0].text


def test_a_judge_without_a_verdict_says_nothing():
    contest = contest_of()
    verdicts = judged_verdicts(contest, [judged([None] * 100, prompts=PROMPTS)])
    [line] = comparison_summary(contest, verdicts)
    assert (line.level, line.text) == ("unsure", "gpt gave no verdict on aligned and base.")
