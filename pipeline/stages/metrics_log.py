"""Metrics of a stage: rows in metrics.jsonl, curves in TensorBoard, one progress line a step."""

from __future__ import annotations

import json
import os
import sys
import time
from types import TracebackType
from typing import Any, TextIO

from pipeline.records import Metrics
from pipeline.stages import storage

METRICS_FILE = "metrics.jsonl"

SHOWN = {
    "train/loss": "loss",
    "eval/loss": "held-out loss",
    "train/nll": "nll",
    "eval/nll": "held-out nll",
    "train/accuracy": "accuracy",
    "eval/accuracy": "held-out accuracy",
    "eval/alarms": "alarms",
    "reward/mean": "reward",
    "eval/reward": "held-out reward",
    "gold/mean": "gold",
    "kl/per_response": "kl",
    "response/tokens": "length",
    "tokens_per_s/step": "tokens/s",
}
"""Metric -> its name on the progress line."""


class MetricsLog:
    """Appends to a stage's metrics.

    Rows of steps from `first_step` on are dropped first: a resumed run writes them again.
    """

    def __init__(
        self, directory: str, stage: str, *, num_steps: int, first_step: int, console: TextIO | None = None
    ) -> None:
        # Imported here: it imports torch, and `jobs/status.py` reads metrics without writing any.
        from tensorboardX import SummaryWriter

        os.makedirs(directory, exist_ok=True)
        self.stage = stage
        self.num_steps = num_steps
        self.first_step = first_step
        self.console = console or sys.stdout
        path = os.path.join(directory, METRICS_FILE)
        keep_rows_before(path, first_step)
        self._rows = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        self._curves = SummaryWriter(os.path.join(directory, "tensorboard"), purge_step=first_step, write_to_disk=True)
        self._started = time.monotonic()

    def write(self, step: int, metrics: Metrics) -> None:
        """Writes the row of a step, its points in TensorBoard and its progress line.

        Raises:
            WorkspaceError: no space is left.
        """
        row = {"stage": self.stage, "step": step, "time": time.time(), **metrics}
        with storage.explaining_full_disk(self._rows.name):
            self._rows.write(json.dumps(row) + "\n")
            self._rows.flush()
        for name, value in metrics.items():
            self._curves.add_scalar(name, value, step)
        self._print(step, metrics)

    def _print(self, step: int, metrics: Metrics) -> None:
        num_done, num_left = step + 1 - self.first_step, self.num_steps - step - 1
        remaining_s = (time.monotonic() - self._started) / max(1, num_done) * num_left
        shown = "  ".join(f"{label} {as_number(metrics[name])}" for name, label in SHOWN.items() if name in metrics)
        position = f"{step + 1}/{self.num_steps}"
        print(f"{self.stage:<19} {position:>9}  {shown}  {as_clock(remaining_s)} left", file=self.console, flush=True)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with storage.explaining_full_disk(self._rows.name):  # a row that found no space is written once more
            self._rows.close()
        self._curves.close()


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


def as_number(value: float) -> str:
    """0.12345 -> "0.1235", 1830.4 -> "1,830"."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def as_clock(seconds: float) -> str:
    """3725.0 -> "1:02:05", 65.0 -> "1:05"."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"
