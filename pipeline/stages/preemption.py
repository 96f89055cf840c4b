"""Notice that this process is about to be ended, as clusters give it: SIGTERM, then a grace time, then SIGKILL."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

LEAVING_S = 5.0
LEAVING_SHARE = 0.2
"""The part of the grace time that is reserved for leaving: at most so many seconds, and at most such a share."""
NOTICE_POLL_S = 0.1


class WaitCutShort(Exception):
    """The notice came before the update of a step, and ends the step."""


class PreemptionNotice:
    """Remembers the signal, so that a run leaves with a commit and an exit code of its own.

    What is lost depends on where in a step the notice comes:

    - Before its update nothing has changed the learner. The step is given up: at once where it waits for rollouts, else
      after the call that it is in. Then the state after the step before is committed, unless it was before. A resumed
      run repeats the step, with the same prompts and seeds.
    - From its update on, the step is completed and committed.
    - An update or a save that takes longer than the grace time is lost. The process then ends as SIGKILL would end it,
      with the last commit.
    """

    def __init__(self, grace_s: float = math.inf, too_late: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            grace_s: seconds from SIGTERM to SIGKILL.
            too_late: called from another thread, shortly before SIGKILL; should end the process.
        """
        self._grace_s = grace_s
        self._too_late = too_late
        self._given_at: float | None = None
        self._may_interrupt = False

    def is_given(self) -> bool:
        """Whether SIGTERM has come."""
        return self._given_at is not None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Handles SIGTERM inside the block, in place of the handler before; main thread only."""
        ended = threading.Event()
        # Started now: a signal handler must take no lock, and so start no thread.
        watcher = threading.Thread(target=self._watch_the_grace, args=(ended,), name="preemption", daemon=True)
        watcher.start()
        handler_before = signal.signal(signal.SIGTERM, self._remember)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, handler_before)
            ended.set()
            watcher.join()

    @contextmanager
    def cutting_short(self) -> Iterator[None]:
        """Inside the block the notice interrupts the main thread, by `WaitCutShort`.

        Only for waits in Python: when a signal handler raises, Ray's calls continue to wait, and then fail.
        """
        try:
            self._may_interrupt = True
            self.end_if_given()
            yield
        finally:
            self._may_interrupt = False

    def end_if_given(self) -> None:
        """Raises WaitCutShort where the notice was given: the work of the next call would be lost."""
        if self.is_given():
            raise WaitCutShort

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._given_at is None:
            self._given_at = time.monotonic()
        if self._may_interrupt:
            self._may_interrupt = False
            raise WaitCutShort

    def _watch_the_grace(self, ended: threading.Event) -> None:
        usable_s = self._grace_s - min(LEAVING_S, LEAVING_SHARE * self._grace_s)
        while not ended.wait(NOTICE_POLL_S):
            given_at = self._given_at
            if given_at is not None and time.monotonic() - given_at > usable_s:
                self._too_late()
                return
