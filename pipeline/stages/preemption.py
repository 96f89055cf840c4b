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
"""What is kept of the grace time to leave in, at most: seconds, and a share of it."""
POLL_S = 0.1


class WaitCutShort(Exception):
    """The notice came before the update of a step, which ends it."""


class PreemptionNotice:
    """Remembers the signal, so that a run leaves with a commit and an exit code of its own.

    Where the notice finds a step decides what is lost:

    - Before its update nothing has touched the learner. The step is given up, at once where it waits for rollouts and
      else behind the call that it is in, and the state behind the step before is committed, if it is not yet. A resumed
      run does the step again, with the same prompts and seeds.
    - From its update on, the step ends and is committed.
    - What is not done when it is time to leave, an update or a save that takes longer, cannot be saved. The process
      then leaves as SIGKILL would have it leave, with the last commit.
    """

    def __init__(self, grace_s: float = math.inf, too_late: Callable[[], None] = lambda: None) -> None:
        """Args:
        grace_s: from SIGTERM to SIGKILL.
        too_late: called from another thread, shortly before SIGKILL; should end the process.
        """
        self._grace_s = grace_s
        self._too_late = too_late
        self._given_at: float | None = None
        self._may_cut = False

    def is_given(self) -> bool:
        return self._given_at is not None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Takes SIGTERM from whoever handled it before, for the length of the block; main thread only."""
        left = threading.Event()
        # Started now: a signal handler must take no lock, and so start no thread.
        clock = threading.Thread(target=self._watch_the_grace, args=(left,), name="preemption", daemon=True)
        clock.start()
        before = signal.signal(signal.SIGTERM, self._remember)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            left.set()
            clock.join()

    @contextmanager
    def cutting_short(self) -> Iterator[None]:
        """Within it the notice ends what the main thread does, by `WaitCutShort`.

        For waits in Python alone: Ray's calls wait on, and then fail, when a signal handler raises.
        """
        try:
            self._may_cut = True
            self.end_if_given()
            yield
        finally:
            self._may_cut = False

    def end_if_given(self) -> None:
        """Raises WaitCutShort where the notice was given: what comes next would be in vain."""
        if self.is_given():
            raise WaitCutShort

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._given_at is None:
            self._given_at = time.monotonic()
        if self._may_cut:
            self._may_cut = False
            raise WaitCutShort

    def _watch_the_grace(self, left: threading.Event) -> None:
        usable_s = self._grace_s - min(LEAVING_S, LEAVING_SHARE * self._grace_s)
        while not left.wait(POLL_S):
            given_at = self._given_at
            if given_at is not None and time.monotonic() - given_at > usable_s:
                self._too_late()
                return
