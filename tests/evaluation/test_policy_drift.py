"""Alarms of a policy: when they are raised, said and not said again; a healthy run has none."""

import numpy as np
import pytest

from pipeline.evaluation.alarms import DIFFICULTY_ALARMS, DIRECT_ALARMS, POLICY_ALARMS, REWARD_ALARMS
from pipeline.evaluation.policy_drift import PolicyAlarms, drift
from pipeline.ragged import Ragged
from pipeline.repetition import repeated_shares
from pipeline.tracking.alarm_names import raised_alarms
from tests.support.paths import ROOT

START = {
    "kl/per_response": 0.0,
    "response/tokens": 20.0,
    "response/repetition": 0.05,
    "ppo/entropy": 0.6,
    "engine_gap/mean": 1e-6,
    "reward/mean": 1.0,
    "reward/std_over_batch": 2.0,
}


def checked(rows, before=()):
    """The last row with its alarms, and all that was said."""
    said = []
    alarms = PolicyAlarms(before, say=said.append)
    return [row | alarms.check(row) for row in rows][-1], said


def run_to(change, steps=3):
    """Three steps at the start, then some behind a change."""
    return [START] * 3 + [START | change] * steps


@pytest.mark.parametrize(
    ("change", "name", "shown"),
    [
        ({"kl/per_response": 10.5}, "far_from_start", "kl/per_response = 10.5"),
        ({"response/tokens": 41.0}, "length_drift", "drift/length = 2.05"),
        ({"response/tokens": 9.0}, "length_drift", "drift/length = 0.45"),
        ({"ppo/entropy": 0.19}, "entropy_collapse", "drift/entropy = 0.317"),
        ({"response/repetition": 0.26}, "repetition", "drift/repetition = 0.21"),
        ({"engine_gap/mean": 0.11}, "engine_gap", "engine_gap/mean = 0.11"),
    ],
)
def test_each_sign_raises_its_alarm_and_says_it_once(change, name, shown):
    row, said = checked(run_to(change, steps=8))
    assert raised_alarms(row) == [name]
    assert row["train/alarms"] == 1.0
    [message] = said
    assert message.startswith(f"alarm {name} ({shown}): ")


@pytest.mark.parametrize(
    "change",
    [
        {"kl/per_response": 9.9},
        {"response/tokens": 39.0},
        {"response/tokens": 10.5},
        {"ppo/entropy": 0.21},
        {"response/repetition": 0.24},
        {"engine_gap/mean": 0.09},
    ],
)
def test_close_to_a_threshold_nothing_is_raised(change):
    row, said = checked(run_to(change))
    assert raised_alarms(row) == []
    assert row["alarm/length_drift"] == 0.0
    assert said == []


def test_a_reward_that_grows_on_training_prompts_alone_is_an_alarm():
    first = START | {"eval/reward": 0.8}
    row, said = checked([first, *[START] * 5, START | {"reward/mean": 4.0, "eval/reward": 1.7}])
    # Training prompts gained 3, validation prompts 0.9: a difference of 2.1 with a standard deviation of 2.
    assert row["drift/reward_gap"] == pytest.approx(1.05)
    assert raised_alarms(row) == ["reward_without_validation"]
    assert len(said) == 1
    row, _ = checked([first, *[START] * 5, START | {"reward/mean": 4.0, "eval/reward": 2.0}])
    assert row["alarm/reward_without_validation"] == 0.0


def test_a_step_without_validation_does_not_judge_it():
    row, _ = checked([START | {"eval/reward": 0.8}, START | {"eval/reward": 0.9}, *[START] * 5])
    assert "alarm/reward_without_validation" not in row


def test_one_noisy_step_is_no_drift():
    rows = [START] * 6 + [START | {"response/tokens": 60.0}]
    # (20 + 20 + 60) / 3 = 33.3 tokens against 20.
    assert drift(rows)["drift/length"] == pytest.approx(5 / 3)
    assert raised_alarms(checked(rows)[0]) == []


def test_too_few_steps_have_no_drift():
    assert drift([START] * 5) == {}


def test_a_resumed_run_looks_back_and_repeats_nothing():
    whole = run_to({"response/tokens": 50.0}, steps=6)
    said = []
    alarms = PolicyAlarms([], say=said.append)
    rows = [row | alarms.check(row) for row in whole]
    resumed, said_again = checked(whole[7:], before=rows[:7])
    assert len(said) == 1
    assert resumed == rows[-1]
    assert said_again == []


TINY = """
0 19.45 0.4992 1.774e-07 1.113
0.1415 18.86 0.4964 1.77e-07 2.129
0.3634 16.91 0.459 1.718e-07 2.734
0.5496 14.43 0.4618 1.793e-07 2.839
0.805 14.98 0.4357 1.78e-07 3.166
0.957 14.21 0.4282 1.815e-07 3.327
1.173 16.3 0.4127 1.75e-07 3.603
1.312 17.9 0.397 1.806e-07 3.873
1.592 17.96 0.3993 1.786e-07 3.779
1.681 18.92 0.3861 1.733e-07 3.95
1.654 18.12 0.3904 1.806e-07 3.938
1.972 18.92 0.3956 1.82e-07 4.342
2.055 19.87 0.3917 1.811e-07 4.213
2.221 19.96 0.3894 1.828e-07 4.158
2.454 20.26 0.379 1.825e-07 4.72
2.631 21.06 0.3793 1.813e-07 4.83
2.76 20.93 0.3709 1.823e-07 4.557
2.952 21.66 0.3712 1.784e-07 4.939
2.808 21.62 0.3749 1.796e-07 4.861
2.853 22.53 0.373 1.764e-07 4.658
2.843 23.21 0.3701 1.797e-07 4.744
2.816 21.34 0.373 1.824e-07 4.838
2.723 22.79 0.3741 1.8e-07 4.707
2.896 22.32 0.3751 1.785e-07 4.585
"""


def test_a_healthy_run_raises_nothing():
    """Steps of the recipe `tiny`, measured on 2026-11-29; its policy wins under the planted truth."""
    names = ("kl/per_response", "response/tokens", "ppo/entropy", "engine_gap/mean", "reward/mean")
    rows = [dict(zip(names, map(float, line.split()), strict=True)) for line in TINY.strip().splitlines()]
    row, said = checked(rows)
    assert len(rows) == 24
    assert said == []
    assert row["train/alarms"] == 0.0


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([1, 2, 3], 0.0),
        ([1, 2, 3, 4, 5], 0.0),
        # 1212, 2121, 1212, 2121, 1212: two of five are new.
        ([1, 2, 1, 2, 1, 2, 1, 2], 0.6),
        ([7] * 13, 0.9),
    ],
)
def test_repetition_is_the_share_of_4_grams_seen_before(tokens, share):
    assert repeated_shares(Ragged.of([tokens], np.int32)).tolist() == pytest.approx([share])


def test_the_page_shows_every_alarm_with_its_threshold():
    page = (ROOT / "docs" / "alarms.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    alarms = (*POLICY_ALARMS, *DIFFICULTY_ALARMS, *DIRECT_ALARMS, *REWARD_ALARMS)
    assert rows == [f"| `{alarm.name}` | {alarm.raised_when} |" for alarm in alarms]
