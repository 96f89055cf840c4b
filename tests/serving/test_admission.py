"""A full replica refuses at once and says when to come back."""

import pytest

from pipeline.errors import Overloaded
from pipeline.serving.admission import Admission


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_rows_beyond_the_limit_are_refused_until_room_is_free():
    admission = Admission(10)
    with admission.admit(6):
        with pytest.raises(Overloaded, match=r"6 responses wait to be scored and at most 10 may"), admission.admit(5):
            pass
        with admission.admit(4):
            assert admission.is_full
    assert admission.pending_rows == 0
    with admission.admit(5):
        assert not admission.is_full


def test_an_idle_replica_takes_a_request_of_any_size():
    with Admission(10).admit(1000):
        pass


def test_room_is_given_back_when_scoring_fails():
    admission = Admission(10)
    with pytest.raises(ValueError, match="scoring"), admission.admit(10):
        raise ValueError("scoring failed")
    assert admission.pending_rows == 0


def test_the_wait_is_what_the_pending_rows_should_take():
    clock = Clock()
    admission = Admission(100, clock=clock)
    assert admission.retry_after_s == 1  # nothing is known yet
    with admission.admit(10):
        clock.now = 2.0  # 0.2 s per row
    with admission.admit(40):
        assert admission.retry_after_s == 8
        clock.now = 18.0  # 0.4 s per row: a fifth of the way from 0.2
    with admission.admit(45):
        assert admission.retry_after_s == 11


def test_nobody_is_sent_away_for_more_than_a_minute():
    clock = Clock()
    admission = Admission(100, clock=clock)
    with admission.admit(1):
        clock.now = 500.0
    with admission.admit(99):
        assert admission.retry_after_s == 60
