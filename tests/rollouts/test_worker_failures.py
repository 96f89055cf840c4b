"""What happens when a rollout worker dies, hangs or fails: literal cases, without Ray."""

import pytest

from pipeline.config.cluster import RolloutConfig
from pipeline.errors import DeadlineExceeded, StaleEngineError, WorkerDied
from pipeline.rollouts.worker_failures import (
    FailureDecision,
    WorkerFailure,
    deadline_exceeded,
    decide_on_failure,
    worker_died,
)

ERROR = WorkerDied("rollout worker 0 died")


def decide(call, kind, *, restarts_left=1, **circumstances):
    decision = decide_on_failure(
        WorkerFailure(call=call, kind=kind, error=ERROR, **circumstances), restarts_left=restarts_left
    )
    assert decision.error is ERROR
    return decision.action, decision.ends_worker


@pytest.mark.parametrize(
    ("call", "kind", "action", "ends_worker"),
    [
        ("start", "died", "replace", True),
        ("start", "hangs", "raise", False),
        ("start", "failed", "raise", False),
        ("sleep", "died", "drop", True),
        ("sleep", "hangs", "drop", True),
        ("sleep", "failed", "drop", True),
        ("load_weights", "died", "replace", True),
        ("load_weights", "hangs", "replace", True),
        ("load_weights", "failed", "raise", False),
        ("sample", "died", "replace", True),
        ("sample", "hangs", "replace", True),
        ("sample", "failed", "raise", False),
        ("advance", "died", "replace", True),
        ("advance", "hangs", "raise", False),
        ("advance", "failed", "raise", False),
    ],
)
def test_a_worker_that_serves_is_replaced_where_another_could_do_better(call, kind, action, ends_worker):
    assert decide(call, kind) == (action, ends_worker)


@pytest.mark.parametrize(
    ("call", "kind"),
    [("start", "died"), ("load_weights", "died"), ("load_weights", "hangs"), ("sample", "hangs"), ("advance", "died")],
)
def test_without_a_restart_left_the_worker_is_ended_and_its_error_raised(call, kind):
    assert decide(call, kind, restarts_left=0) == ("raise", True)


def test_a_worker_that_does_not_sleep_is_dropped_whatever_the_budget():
    assert decide("sleep", "died", restarts_left=0) == ("drop", True)


@pytest.mark.parametrize("kind", ["died", "hangs", "failed"])
def test_a_worker_that_joins_is_dropped_whatever_happens_to_it(kind):
    assert decide("load_weights", kind, standing="joining") == ("drop", True)
    assert decide("load_weights", kind, standing="joining", restarts_left=0) == ("drop", True)


@pytest.mark.parametrize("kind", ["died", "hangs"])
def test_a_worker_that_has_left_needs_no_replacement_and_is_not_ended_again(kind):
    assert decide("sample", kind, standing="left") == ("drop", False)
    assert decide("sample", kind, standing="left", restarts_left=0) == ("drop", False)


def test_the_error_of_an_answer_that_nobody_awaits_is_dropped_and_the_worker_stays():
    assert decide("sample", "failed", is_awaited=False) == ("drop", False)
    assert decide("sample", "failed", is_awaited=False, standing="left") == ("drop", False)
    assert decide("sample", "failed", standing="left") == ("raise", False)


@pytest.mark.parametrize("kind", ["died", "hangs"])
def test_a_worker_that_serves_is_replaced_even_if_nobody_awaits_its_answer(kind):
    assert decide("sample", kind, is_awaited=False) == ("replace", True)


def test_a_decision_is_a_value():
    stale = StaleEngineError("rollout worker 0 is stale")
    failure = WorkerFailure(call="load_weights", kind="failed", error=stale)
    decision = decide_on_failure(failure, restarts_left=2)
    assert decision == FailureDecision(action="raise", ends_worker=False, error=stale)
    with pytest.raises(AttributeError):
        decision.action = "drop"


def test_the_errors_name_worker_call_and_setting():
    config = RolloutConfig(cpus_per_worker=1.5, gpus_per_worker=0, max_restarts=3)
    died = worker_died("rollout worker 4", "load_weights() of policy version 2", config)
    assert isinstance(died, WorkerDied)
    assert str(died) == (
        "rollout worker 4 died during load_weights() of policy version 2; the budget is 3 restarts "
        "(cluster.rollout.max_restarts). Often it ran out of memory: lower kv_cache_gib or max_sequences. The "
        "workspace is intact; the same command resumes."
    )
    late = deadline_exceeded("rollout worker 4", "sample()", 1.5, config, {"CPU": 0.25})
    assert isinstance(late, DeadlineExceeded)
    assert str(late) == (
        "rollout worker 4: sample() did not return within 1.5 s. It hangs, is slow, or waits for a place (it needs "
        "1.5 CPU and 0 GPU; 0.25 and 0 are free). See its log; lower cluster.rollout.chunk_size or workers, or raise "
        "cluster.deadlines."
    )
