"""A function that scores, in this process: for experiments and tests that start no other."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from pipeline.rewards.function_calls import LoadedFunction, failed
from pipeline.rewards.function_spec import FunctionSpec
from pipeline.rewards.rows import RewardRows, SourceScore


class FunctionInProcess:
    """Implements `RewardSource`. A batch that exceeds its deadline is given up, though its thread cannot be ended."""

    def __init__(self, spec: FunctionSpec) -> None:
        """Raises ConfigError as `load_function`."""
        self._spec = spec
        self._function = LoadedFunction(spec)

    def score(self, rows: RewardRows) -> list[SourceScore]:
        return [score for batch in batches(rows, self._spec.batch_size) for score in self._batch(batch)]

    def _batch(self, rows: RewardRows) -> list[SourceScore]:
        scores: list[SourceScore] = []
        thread = threading.Thread(target=lambda: scores.extend(self._function.score(rows)), daemon=True)
        thread.start()
        thread.join(self._spec.deadline_s)
        if thread.is_alive():
            return failed(rows, "timed_out", f"no answer within {self._spec.deadline_s:g} s")
        return scores if scores else failed(rows, "died", "the function ended its thread")


def batches(rows: RewardRows, size: int) -> Iterator[RewardRows]:
    """The rows in parts of at most `size`, in order."""
    for start in range(0, len(rows), size):
        yield rows.part(start, start + size)
