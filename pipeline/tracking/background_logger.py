"""A logger behind a queue: it never ends a run, and never makes it wait for long."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pipeline.tracking.metrics_logger import RunLogger

if TYPE_CHECKING:
    from pipeline.records import Metrics  # imports torch, which a logger's process does without

ROWS_WAITING = 1000
"""Rows that may wait for a slow logger. What comes on top is lost, and counted."""

CLOSE_S = 30.0
"""Seconds that the end of a stage waits for its loggers, all together."""


class BackgroundLogger:
    """Opens a logger and feeds it in a thread of its own. Counts what is lost, and says the first failure at once."""

    def __init__(
        self,
        name: str,
        logger: RunLogger,
        *,
        keep_run_id: Callable[[str], None],
        say: Callable[[str], None],
        waiting: int = ROWS_WAITING,
    ) -> None:
        """
        Args:
            keep_run_id: writes down the run that a resumed stage continues.
            say: shows a line to the user.
            waiting: rows that may wait.
        """
        self.name = name
        self.rows_lost = 0
        self._logger = logger
        self._keep_run_id = keep_run_id
        self._say = say
        self._num_rows = 0
        self._failure: str | None = None
        self._rows: queue.Queue[tuple[int, Metrics] | None] = queue.Queue(maxsize=waiting + 1)
        self._waiting = waiting
        self._thread = threading.Thread(target=self._feed, name=f"logger {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Metrics) -> None:
        """Leaves a row to the logger; returns at once."""
        self._num_rows += 1
        # One place is left for the end of the queue.
        if self._rows.qsize() >= self._waiting:
            self._lose(f"{self._waiting} rows wait for it")
        else:
            self._rows.put_nowait((step, metrics))

    def end(self) -> None:
        """No row comes after this."""
        self._rows.put_nowait(None)

    def wait(self, deadline: float) -> None:
        """Waits until everything is written, or until `time.monotonic()` is `deadline`; then says what was lost."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self.rows_lost += sum(row is not None for row in list(self._rows.queue))
            self._failure = "did not finish in time"  # its end is no news
            self._say(f"logging: {self.name} {self._failure}; the run does not wait for it")
            self._logger.give_up()
        if self.rows_lost:
            self._say(f"logging: {self.name} lost {self.rows_lost} of {self._num_rows} rows; metrics.jsonl has all")

    def _feed(self) -> None:
        is_open = self._attempt(lambda: self._keep_run_id(self._logger.open()))
        while (row := self._rows.get()) is not None:
            if not is_open or not self._attempt(partial(self._logger.log, *row)):
                self.rows_lost += 1
        if is_open:
            self._attempt(self._logger.close)

    def _attempt(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:  # of any kind: these are other people's libraries
            self._say_once(str(error) or type(error).__name__)
            return False
        return True

    def _lose(self, why: str) -> None:
        self.rows_lost += 1
        self._say_once(why)

    def _say_once(self, failure: str) -> None:
        if self._failure is None:
            self._failure = failure
            self._say(f"logging: {self.name} fails ({failure}). The run continues, and metrics.jsonl has every row.")


def close_all(loggers: Sequence[BackgroundLogger], *, timeout_s: float | None = None) -> None:
    """Ends them all, and waits for all together: `CLOSE_S` seconds, unless given."""
    for logger in loggers:
        logger.end()
    deadline = time.monotonic() + (CLOSE_S if timeout_s is None else timeout_s)
    for logger in loggers:
        logger.wait(deadline)
