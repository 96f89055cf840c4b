"""A logger that raises, blocks or is slow neither ends a run nor delays it."""

import threading
import time

from pipeline.tracking.background_logger import BackgroundLogger, close_all


class FakeLogger:
    """Keeps rows; fails or waits where a test says so."""

    def __init__(self, *, fails_at=(), waits_at=None, opens=True):
        self.rows, self.is_closed = [], False
        self.given_up = threading.Event()
        self._fails_at = fails_at
        self._waits_at = waits_at
        self._opens = opens

    def open(self):
        if not self._opens:
            raise OSError("no route to host")
        return "run-7"

    def log(self, step, metrics):
        if step == self._waits_at:
            self.given_up.wait()
        if step in self._fails_at:
            raise ValueError(f"step {step} is refused")
        self.rows.append((step, metrics))

    def close(self):
        self.is_closed = True

    def give_up(self):
        self.given_up.set()


def run(logger, steps, *, timeout_s=5.0, waiting=1000):
    """What is said, the ids kept, and the seconds that the run took."""
    said, ids = [], []
    started = time.monotonic()
    background = BackgroundLogger("fake", logger, keep_run_id=ids.append, say=said.append, waiting=waiting)
    for step in range(steps):
        background.log(step, {"loss": float(step)})
    close_all([background], timeout_s=timeout_s)
    return said, ids, time.monotonic() - started


def test_rows_arrive_in_order_and_the_run_id_is_kept():
    logger = FakeLogger()
    said, ids, _ = run(logger, 300)
    assert logger.rows == [(step, {"loss": float(step)}) for step in range(300)]
    assert logger.is_closed
    assert (said, ids) == ([], ["run-7"])


def test_failures_are_said_once_and_counted_and_later_rows_arrive():
    logger = FakeLogger(fails_at=(1, 2))
    said, _, _ = run(logger, 4)
    assert [step for step, _ in logger.rows] == [0, 3]
    assert said == [
        "logging: fake fails (step 1 is refused). The run continues, and metrics.jsonl has every row.",
        "logging: fake lost 2 of 4 rows; metrics.jsonl has all",
    ]


def test_a_logger_that_does_not_open_loses_all_rows_and_stops_nothing():
    said, ids, _ = run(FakeLogger(opens=False), 3)
    assert said[0].startswith("logging: fake fails (no route to host)")
    assert said[1:] == ["logging: fake lost 3 of 3 rows; metrics.jsonl has all"]
    assert ids == []


def test_a_logger_that_blocks_is_given_up_and_what_waited_for_it_is_counted():
    logger = FakeLogger(waits_at=2)
    said, _, seconds = run(logger, 100, timeout_s=0.5, waiting=10)
    assert seconds < 3.0
    assert logger.given_up.is_set()
    assert said[0].startswith("logging: fake fails (10 rows wait for it)")
    assert said[1] == "logging: fake did not finish in time; the run does not wait for it"
    lost = int(said[2].split()[3])
    assert said[2] == f"logging: fake lost {lost} of 100 rows; metrics.jsonl has all"
    # Two rows were written, one was in its hands; how many fitted into the queue before depends on the threads.
    assert 80 <= lost <= 97
