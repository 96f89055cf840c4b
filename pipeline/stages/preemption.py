"""Notice that this process is about to be ended, as clusters give it: SIGTERM, then a grace time, then SIGKILL."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class PreemptionNotice:
    """Remembers the signal. A loop asks after every step, commits it and leaves; nothing is cut in half."""

    def __init__(self) -> None:
        self._given = False

    def is_given(self) -> bool:
        return self._given

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Takes SIGTERM from whoever handled it before, for the length of the block; main thread only."""
        before = signal.signal(signal.SIGTERM, self._remember)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._given = True
