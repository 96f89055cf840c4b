"""Metrics of a stage: rows in metrics.jsonl, the same rows in the loggers, progress on the console."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TextIO

from pipeline.records import Metrics
from pipeline.stages import storage
from pipeline.tracking.alarm_names import raised_alarms
from pipeline.tracking.background_logger import BackgroundLogger, close_all
from pipeline.tracking.progress import Progress, as_number

METRICS_FILE = "metrics.jsonl"

TRAINING_NUMBERS = {
    "train/loss": "loss",
    "train/nll": "nll",
    "train/accuracy": "accuracy",
    "reward/mean": "reward",
    "kl/per_response": "kl",
    "gold/mean": "gold",
    "response/tokens": "length",
}
"""Metric of an update -> its name on the console. A row shows the first three that it has."""

EVALUATION_NUMBERS = {
    "eval/reward": "held-out reward",
    "eval/loss": "held-out loss",
    "eval/nll": "held-out nll",
    "eval/accuracy": "held-out accuracy",
    "eval/kl": "held-out kl",
}
"""Metric of an evaluation -> its name on the console. A row shows the first three that it has."""

SHOWN_OF_EACH = 3

TOKENS_PER_S = "tokens_per_s/step"
"""The rate of a step that knows its own; other steps are counted in rows of their batch."""


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """What a step worked on, for the rate on the console."""

    count: int
    unit: str
    """As in "pairs"."""


class MetricsLog:
    """Appends to a stage's metrics.

    Rows of steps from `first_step` on are dropped first: a resumed run writes them again.
    """

    def __init__(
        self,
        directory: str,
        stage: str,
        *,
        num_steps: int,
        first_step: int,
        start_loggers: Callable[[], Sequence[BackgroundLogger]] = list,
        console: TextIO | None = None,
    ) -> None:
        """
        Args:
            start_loggers: called once the directory is there.
            console: where the progress is shown; standard output unless given.
        """
        os.makedirs(directory, exist_ok=True)
        self.stage = stage
        path = os.path.join(directory, METRICS_FILE)
        keep_rows_before(path, first_step)
        self._rows = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        self._loggers = start_loggers()
        self._progress = Progress(stage, num_steps, done=first_step, stream=console)
        self._num_rows = 0

    def write(self, step: int, metrics: Metrics, work: StepWork | None = None) -> None:
        """Writes the row of a step, gives it to the loggers and shows it.

        Args:
            work: None for a row that is no step of its own, and for a step that measured its rate.

        Raises:
            WorkspaceError: no space is left.
        """
        row = {"stage": self.stage, "step": step, "time": time.time(), **metrics}
        with storage.explaining_full_disk(self._rows.name):
            self._rows.write(json.dumps(row) + "\n")
            self._rows.flush()
        for logger in self._loggers:
            logger.log(step, metrics)
        words = [*in_words(metrics, TRAINING_NUMBERS), *self._rate(metrics, work)]
        if alarms := raised_alarms(metrics):
            words.append(f"alarms: {', '.join(alarms)}")
        self._progress.show(step + 1, "  ".join(words), news="  ".join(in_words(metrics, EVALUATION_NUMBERS)))

    def _rate(self, metrics: Metrics, work: StepWork | None) -> list[str]:
        if TOKENS_PER_S in metrics:
            return [f"{as_number(metrics[TOKENS_PER_S])} tokens/s"]
        if work is None:
            return []
        self._num_rows += work.count
        return [f"{as_number(self._num_rows / self._progress.seconds)} {work.unit}/s"]

    def __enter__(self) -> MetricsLog:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        close_all(self._loggers)
        with storage.explaining_full_disk(self._rows.name):  # a row that found no space is written once more
            self._rows.close()


def in_words(metrics: Metrics, names: Mapping[str, str]) -> list[str]:
    """The first three of `names` that a row has, with their values."""
    return [f"{names[metric]} {as_number(metrics[metric])}" for metric in names if metric in metrics][:SHOWN_OF_EACH]


def keep_rows_before(path: str, first_step: int) -> None:
    """Rewrites a metrics file without the rows of steps >= first_step, and without a half-written last line."""
    if not os.path.exists(path):
        return
    kept = [row for row in read_metrics(path) if row["step"] < first_step]
    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in kept)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def read_metrics(path: str) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line that a killed writer left incomplete is ignored."""
    with open(path, encoding="utf-8") as stream:
        return parse_metrics(stream.read())


def parse_metrics(text: str) -> list[dict[str, Any]]:
    """The rows of a metrics file's contents, as `read_metrics` returns them."""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
