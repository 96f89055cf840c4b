"""How long a stage has taken, over all its attempts: those that were killed or preempted too."""

from __future__ import annotations

import contextlib
import threading
import time
from types import TracebackType

from pipeline.errors import WorkspaceError
from pipeline.stages.workspace import StageDirectory

PERIOD_S = 10.0
"""How often the time is written down: a kill loses no more than that."""


class AttemptClock:
    """Runs while a stage is computed, and adds to what its earlier attempts have taken."""

    def __init__(self, stage: StageDirectory) -> None:
        self._stage = stage
        self.seconds_before = stage.seconds_spent()
        """Of the attempts before this one."""
        self._started = time.monotonic()
        self._ended = threading.Event()
        self._writer = threading.Thread(target=self._write_regularly, name="attempt clock", daemon=True)

    @property
    def seconds(self) -> float:
        """Of all attempts, so far."""
        return self.seconds_before + time.monotonic() - self._started

    def _write_regularly(self) -> None:
        while not self._ended.wait(PERIOD_S):
            self._write()

    def _write(self) -> None:
        # A full disk ends the stage where it writes its result; this number is no reason to.
        with contextlib.suppress(OSError, WorkspaceError):
            self._stage.record_seconds(self.seconds)

    def __enter__(self) -> AttemptClock:
        self._writer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._writer.join()
        self._write()
