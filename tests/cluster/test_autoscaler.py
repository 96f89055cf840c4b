"""Decisions worked by hand: n workers need R seconds, the learner needs U = R + queue wait - learner wait."""

import logging
import math

import pytest

from cluster.autoscaler import Autoscaler, RolloutWaits, decide_workers
from pipeline.config.cluster import AutoscaleConfig

BOUNDS = AutoscaleConfig(min_workers=1, max_workers=8, cooldown_s=60)


def waits(rollout, learner):
    return RolloutWaits(
        rollout_s=rollout, learner_wait_s=max(0.0, rollout - learner), queue_wait_s=max(0.0, learner - rollout)
    )


def decide(rollout, learner, workers, *, config=BOUNDS, since=math.inf):
    return decide_workers(waits(rollout, learner), workers=workers, config=config, since_change_s=since)


def test_what_the_learner_did_is_what_neither_waited_for():
    assert waits(30.0, 20.0).learner_s == 20.0
    assert waits(10.0, 20.0).learner_s == 20.0


@pytest.mark.parametrize(
    ("rollout", "learner", "workers", "wanted"),
    [
        (30.0, 20.0, 2, 3),  # 60 worker-seconds in 22 s: 2.7 workers
        (10.0, 20.0, 4, 2),  # 40 in 22 s: 1.8
        (20.0, 20.0, 2, 2),  # 40 in 22 s: 1.8
        (21.9, 20.0, 2, 2),  # 43.8 in 22 s: late by less than the margin
        (22.2, 20.0, 2, 3),  # 44.4 in 22 s: by more
        (11.0, 20.0, 2, 1),  # 22 in 22 s
    ],
)
def test_the_fewest_workers_that_keep_up_with_the_learner(rollout, learner, workers, wanted):
    assert decide(rollout, learner, workers).workers == wanted


@pytest.mark.parametrize("workers", range(1, 9))
@pytest.mark.parametrize("learner", [7.0, 20.0, 33.0])
def test_a_decision_stands_once_it_is_followed(workers, learner):
    work = 100.0  # worker-seconds
    followed = decide(work / workers, learner, workers).workers
    assert decide(work / followed, learner, followed).workers == followed


def test_bounds_hold_and_the_reason_names_them():
    far_too_slow = decide(100.0, 10.0, 2)
    assert far_too_slow.workers == 8
    assert "19 would balance them, the bounds are 1 to 8" in far_too_slow.reason
    assert decide(1.0, 100.0, 4, config=BOUNDS.model_copy(update={"min_workers": 3})).workers == 3
    outside = decide(10.0, 10.0, 12)
    assert (outside.workers, outside.reason) == (8, "12 is outside of 1 to 8")


def test_nothing_changes_during_the_cool_down_or_without_an_overlap():
    assert decide(30.0, 20.0, 2, since=59.0).workers == 2
    assert decide(30.0, 20.0, 2, since=59.0).reason == "changed 59 s ago, cool-down is 60 s"
    assert decide(30.0, 20.0, 2, since=60.0).workers == 3
    assert decide(30.0, 0.0, 2).workers == 2


def test_a_worker_that_takes_longer_to_start_than_the_cool_down_is_asked_for_once(caplog):
    now = [1000.0]
    autoscaler = Autoscaler(BOUNDS, clock=lambda: now[0])
    with caplog.at_level(logging.WARNING, logger="cluster.autoscaler"):
        for _ in range(3):
            assert autoscaler.target_workers(2, waits(30.0, 20.0)) == 3
            now[0] += 61
        assert autoscaler.target_workers(3, waits(10.0, 20.0)) == 2
    said = [record.getMessage().partition(":")[0] for record in caplog.records]
    assert said == ["rollout workers 2 -> 3", "rollout workers 3 -> 2"]


def test_a_change_starts_the_cool_down_and_is_logged_with_its_reason(caplog):
    now = [1000.0]
    autoscaler = Autoscaler(BOUNDS, clock=lambda: now[0])
    with caplog.at_level(logging.WARNING, logger="cluster.autoscaler"):
        assert autoscaler.target_workers(2, None) is None
        assert autoscaler.target_workers(2, waits(20.0, 20.0)) is None
        assert autoscaler.target_workers(2, waits(30.0, 20.0)) == 3
        now[0] += 59
        assert autoscaler.target_workers(2, waits(30.0, 20.0)) == 3  # the third is still starting
        assert autoscaler.target_workers(3, waits(10.0, 20.0)) == 3
        now[0] += 1
        assert autoscaler.target_workers(3, waits(10.0, 20.0)) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "rollout workers 2 -> 3: the learner waited 10.0 s for rollouts and they 0.0 s for it "
        "(rollout 30.0 s, learner 20.0 s)",
        "rollout workers 3 -> 2: the learner waited 0.0 s for rollouts and they 10.0 s for it "
        "(rollout 10.0 s, learner 20.0 s)",
    ]


def test_bounds_that_cross_are_refused():
    with pytest.raises(ValueError, match=r"min_workers = 4 exceeds max_workers = 2"):
        AutoscaleConfig(min_workers=4, max_workers=2)
