"""How many rows a replica accepts: it refuses at once what it cannot score soon, so that no long queue grows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.errors import Overloaded

SMOOTHING = 0.2
"""Share of the newest observation in the running estimate of seconds per row."""

LONGEST_RETRY_S = 60
"""The longest time after which a refused client is told to try again."""


class Admission:
    """Counts the rows that were accepted and are not scored yet."""

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
        """Counts the rows as pending while the block runs. An idle replica accepts a request of any size.

        Raises:
            Overloaded: the rows do not fit beside those already pending.
        """
        if self.pending_rows and self.pending_rows + rows > self._max_pending_rows:
            raise Overloaded(
                f"{self.pending_rows} responses wait to be scored and at most {self._max_pending_rows} may. "
                f"Ask again in {self.retry_after_s} s, or serve with more replicas."
            )
        self.pending_rows += rows
        rows_until_done, started = self.pending_rows, self._clock()
        try:
            yield
        finally:
            self.pending_rows -= rows
            # When these rows are scored, so are the rows that were pending before them.
            observed = (self._clock() - started) / max(1, rows_until_done)
            estimate = self._seconds_per_row
            self._seconds_per_row = observed if estimate == 0.0 else estimate + SMOOTHING * (observed - estimate)

    @property
    def retry_after_s(self) -> int:
        """In how many whole seconds, at least one, the pending rows should be scored."""
        return min(LONGEST_RETRY_S, max(1, math.ceil(self.pending_rows * self._seconds_per_row)))
