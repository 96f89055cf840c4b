"""How much a replica takes on: what it cannot score soon it refuses at once, instead of letting a queue grow."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.errors import Overloaded

SMOOTHING = 0.2
"""Share of the newest observation in the running estimate of seconds per row."""

LONGEST_RETRY_S = 60


class Admission:
    """Counts the rows taken on and not yet scored."""

    def __init__(self, max_pending_rows: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.pending_rows = 0
        self._max_pending_rows = max_pending_rows
        self._clock = clock
        self._seconds_per_row = 0.0

    @property
    def is_full(self) -> bool:
        return self.pending_rows >= self._max_pending_rows

    @contextmanager
    def admit(self, rows: int) -> Iterator[None]:
        """Holds room for the rows while the block runs. An idle replica takes a request of any size.

        Raises:
            Overloaded: they do not fit beside those already pending.
        """
        if self.pending_rows and self.pending_rows + rows > self._max_pending_rows:
            raise Overloaded(
                f"{self.pending_rows} responses wait to be scored and at most {self._max_pending_rows} may. "
                f"Ask again in {self.retry_after_s} s, or serve with more replicas."
            )
        self.pending_rows += rows
        ahead, began = self.pending_rows, self._clock()
        try:
            yield
        finally:
            self.pending_rows -= rows
            # These rows were done when everything ahead of them was.
            observed = (self._clock() - began) / max(1, ahead)
            known = self._seconds_per_row
            self._seconds_per_row = observed if known == 0.0 else known + SMOOTHING * (observed - known)

    @property
    def retry_after_s(self) -> int:
        """When what is pending should be done: whole seconds, at least one."""
        return min(LONGEST_RETRY_S, max(1, math.ceil(self.pending_rows * self._seconds_per_row)))
