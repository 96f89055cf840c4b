"""The sentences that open a report, for each thing that a run can turn out to be."""

import pytest

from pipeline.reporting.alarm_history import AlarmHistory
from pipeline.reporting.verdict import (
    alarm_findings,
    policy_findings,
    prompt_findings,
    reason_findings,
    reward_findings,
    verdict,
)

OBJECTIVES = ("helpfulness", "honesty")
REWARD = {
    "eval/accuracy": 0.926,
    "eval/accuracy_low": 0.901,
    "eval/accuracy_high": 0.947,
    "eval/accuracy_over_length_low": 0.38,
    "eval/accuracy_over_length_high": 0.48,
    "eval/longer_is_better": 0.492,
    "eval/nll": 0.22,
    "eval/scale": 3.0,
    "data/heldout_pairs": 512.0,
    "reasons/collinearity": 0.12,
    "reasons/helpfulness/pair_accuracy": 0.9,
    "reasons/helpfulness/pairs": 400.0,
    "reasons/honesty/pair_accuracy": 0.82,
    "reasons/honesty/pairs": 380.0,
}
OWN = {
    "reward/win_rate": 0.9,
    "reward/low": 0.86,
    "reward/high": 0.93,
    "words/base": 24.0,
    "words/aligned": 21.0,
    "opening/base": 0.08,
    "opening/aligned": 0.15,
}
GOLD = {"gold/win_rate": 0.881, "gold/low": 0.835, "gold/high": 0.915}
LAST_STEP = {"kl/per_response": 2.9, "response/stopped": 0.99}


def history(name, *, is_raised, raised_at=()):
    return AlarmHistory(
        name=name,
        raised_when=f"{name} is above 1",
        is_raised=is_raised,
        values=f"{name} = 2",
        message=f"alarm {name} ({name} = 2): look" if is_raised else "",
        checked=3,
        raised_at=raised_at,
    )


QUIET = [history("scale", is_raised=False), history("miscalibration", is_raised=False)]


def only(findings):
    [finding] = findings
    return finding.level, finding.text


def test_a_run_in_which_all_is_well_says_so_in_four_sentences():
    findings = verdict(REWARD, OWN | GOLD, LAST_STEP, OBJECTIVES, QUIET)
    assert [(finding.level, finding.text) for finding in findings] == [
        (
            "good",
            "The reward is usable: it orders 92.6% [90.1, 94.7] of 512 held-out pairs right, and "
            '"longer is better" only 49.2%.',
        ),
        (
            "good",
            "Its reasons are verified for every objective: helpfulness (90% of 400), honesty (82% of 380) of held-out "
            "pairs ordered as annotated.",
        ),
        (
            "good",
            "The policy improved: by the planted truth it wins 88.1% [83.5, 91.5] against its start; KL 2.9 nats a "
            "response, 24 words an answer before and 21 after.",
        ),
        ("good", "Nothing looks wrong: none of 2 alarms is raised."),
    ]


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({"eval/accuracy_low": 0.49}, "bad", "The reward is not usable: it orders 92.6% [49.0, 94.7]"),
        (
            {"eval/accuracy_over_length_low": -0.02},
            "unsure",
            'these pairs do not tell the reward from "longer is better", which orders 49.2%.',
        ),
        (
            {"eval/accuracy_over_length_low": -0.09, "eval/accuracy_over_length_high": -0.01},
            "bad",
            '"longer is better" more, 49.2%.',
        ),
    ],
)
def test_a_reward_must_beat_a_coin_and_length(change, level, words):
    found, text = only(reward_findings(REWARD | change))
    assert found == level
    assert words in text


@pytest.mark.parametrize(
    ("share", "low", "level", "words"),
    [
        (
            0.78,
            0.73,
            "good",
            "The reward reads the prompt: the response chosen for it beats one chosen for another in 78.0%",
        ),
        (0.52, 0.46, "unsure", "one answer, such as an apology, can please it for every prompt"),
    ],
)
def test_a_reward_that_does_not_read_the_prompt_is_told(share, low, level, words):
    measured = {f"eval/mismatched_accuracy{end}": x for end, x in (("", share), ("_low", low), ("_high", 0.83))}
    found, text = only(prompt_findings(REWARD | measured))
    assert found == level
    assert words in text
    assert prompt_findings(REWARD) == []


def test_pairs_of_one_prompt_say_nothing_of_others():
    alone = {name: value for name, value in REWARD.items() if not name.endswith(("_low", "_high"))}
    assert only(reward_findings(alone)) == (
        "unsure",
        "It is not known whether the reward is usable: it orders 92.6% of the pairs of one prompt right.",
    )


def test_a_reward_that_is_too_sure_is_used_for_its_order():
    usable, odds = reward_findings(REWARD | {"eval/nll": 0.99})
    assert (usable.level, odds.level) == ("good", "unsure")
    assert odds.text.startswith("Use the order of its rewards, not its probabilities: their NLL of 0.99")
    # The probabilities that a user sees are calibrated.
    only(reward_findings(REWARD | {"eval/nll": 0.99, "eval/calibrated_nll": 0.6}))
    _, odds = reward_findings(REWARD | {"eval/nll": 0.6, "eval/calibrated_nll": 0.99})
    assert "NLL of 0.99" in odds.text


def test_reasons_are_given_for_verified_objectives_alone():
    some = REWARD | {"reasons/honesty/pair_accuracy": 0.61}
    assert only(reason_findings(some, OBJECTIVES)) == (
        "unsure",
        "Its reasons are verified for helpfulness (90% of 400). For honesty (61% of 380) the model cannot tell: a "
        "reason needs agreement with the annotators on 65% of at least 30 pairs.",
    )
    none = some | {"reasons/helpfulness/pair_accuracy": 0.5}
    assert only(reason_findings(none, OBJECTIVES)) == (
        "bad",
        "The model cannot tell why: no score agrees with annotators on 65% of at least 30 pairs: "
        "helpfulness (50% of 400), honesty (61% of 380).",
    )
    partly = {name: value for name, value in REWARD.items() if "honesty" not in name}
    assert "For honesty the model cannot tell" in only(reason_findings(partly, OBJECTIVES))[1]


def test_without_scores_annotations_or_a_sum_there_are_no_reasons():
    def without(*parts):
        return {name: value for name, value in REWARD.items() if not any(part in name for part in parts)}

    for metrics, words in (
        (without("reasons/"), "this head has no objective scores"),
        (without("pair_accuracy"), "cannot be verified: no held-out pair is annotated"),
        (without("eval/scale"), "it is no sum over the objectives"),
    ):
        level, text = only(reason_findings(metrics, OBJECTIVES))
        assert level == "unsure"
        assert words in text


@pytest.mark.parametrize(("accuracy", "level"), [(0.71, "good"), (0.6, "unsure")])
def test_named_reasons_are_held_against_the_truth_where_it_is_known(accuracy, level):
    known = REWARD | {"reasons/decisive_accuracy": accuracy, "reasons/decisive_pairs": 480.0}
    _, decisive = reason_findings(known, OBJECTIVES)
    assert decisive.level == level
    assert f"of 480 pairs with a named reason, the objective named as decisive is the true one in {accuracy:.0%}." in (
        decisive.text
    )


@pytest.mark.parametrize(
    ("gold", "own", "levels", "words"),
    [
        ((0.52, 0.46, 0.58), (0.5, 0.44, 0.56), ["unsure"], "It is not known whether the policy improved"),
        ((0.3, 0.25, 0.36), (0.4, 0.34, 0.46), ["bad"], "The policy got worse: by the planted truth it wins 30.0%"),
        # The reward model likes what the truth does not: over-optimisation.
        ((0.3, 0.25, 0.36), (0.9, 0.86, 0.93), ["bad", "bad"], "The policy may fool it"),
        ((0.52, 0.46, 0.58), (0.9, 0.86, 0.93), ["unsure", "bad"], "The policy may fool it"),
    ],
)
def test_an_independent_judge_decides_whether_the_policy_improved(gold, own, levels, words):
    ends = ("win_rate", "low", "high")
    benchmark = OWN | {
        f"{judge}/{end}": value
        for judge, values in (("gold", gold), ("reward", own))
        for end, value in zip(ends, values, strict=True)
    }
    findings = policy_findings(benchmark, LAST_STEP)
    assert [finding.level for finding in findings] == levels
    assert words in findings[-1].text


def test_other_judges_are_called_by_their_names_and_parts_of_the_prompts_are_no_judges():
    judged = {"judge/win_rate": 0.6, "judge/low": 0.53, "judge/high": 0.67, "judge/safety/win_rate": 0.4}
    level, text = only(policy_findings(OWN | judged, {"kl/per_response": 1.25}))
    assert level == "good"
    assert "by an independent judge it wins 60.0% [53.0, 67.0] against its start; KL 1.2 nats" in text
    named = {"gpt-4/win_rate": 0.6, "gpt-4/low": 0.53, "gpt-4/high": 0.67}
    assert "by gpt-4 it wins 60.0%" in only(policy_findings(OWN | named, {}))[1]


def test_the_reward_model_alone_proves_no_improvement():
    level, text = only(policy_findings(OWN, {}))
    assert level == "unsure"
    assert "by its own reward model it wins 90.0% [86.0, 93.0] against its start; 24 words an answer" in text
    assert "nobody else judged" in text
    level, text = only(policy_findings(OWN | {"reward/low": 0.45}, LAST_STEP))
    assert level == "unsure"
    assert "It is not known whether the policy improved: even by its own reward model it wins 90.0%" in text
    level, text = only(policy_findings(OWN | {"reward/low": 0.41, "reward/high": 0.49}, LAST_STEP))
    assert level == "bad"
    assert text.startswith("The policy got worse: even by its own reward model")


@pytest.mark.parametrize(
    ("answers", "last_step", "told"),
    [
        ({"words/aligned": 37.0}, {}, "The length of its answers changed much"),
        ({"words/aligned": 15.0}, {}, "The length of its answers changed much"),
        ({}, {"eval/kl": 14.2}, "The policy is far from its start, 14.2 nats a response"),
        ({"opening/aligned": 0.42}, {}, "42% of its answers begin with the same words, 8% did before"),
        ({}, {"response/stopped": 0.7}, "30% of the last responses were cut at the length limit"),
    ],
)
def test_what_may_explain_a_win_rate_stands_beside_it(answers, last_step, told):
    benchmark = OWN | GOLD | answers
    improved, aside = policy_findings(benchmark, (LAST_STEP if "eval/kl" not in last_step else {}) | last_step)
    assert (improved.level, aside.level) == ("good", "unsure")
    assert aside.text.startswith(told)


def test_each_alarm_that_is_still_raised_is_a_sentence_with_its_threshold():
    [finding] = alarm_findings([history("a", is_raised=True, raised_at=(3,)), history("b", is_raised=False)])
    assert finding.level == "unsure"
    assert finding.text == "Look at this: alarm a (a = 2): look"
    assert finding.threshold == "Amber: a is above 1."
    assert alarm_findings([]) == []


def test_alarms_that_vanished_are_told_and_are_no_reason_to_doubt():
    quiet = [history("a", is_raised=False), history("b", is_raised=False, raised_at=(10, 20))]
    assert only(alarm_findings(quiet)) == (
        "good",
        "Nothing looks wrong: none of 2 alarms is raised at the end. During training there were b (in 2 of 3 checks, "
        "in steps 10 to 20).",
    )


def test_every_finding_says_what_decides_its_level():
    findings = verdict(REWARD | {"eval/nll": 0.9}, OWN | {"words/aligned": 99.0}, LAST_STEP, OBJECTIVES, QUIET)
    assert len(findings) == 6
    assert all(finding.threshold.endswith(".") for finding in findings)
    assert all(any(c in finding.threshold for c in ("Green", "Amber", "Red")) for finding in findings)
