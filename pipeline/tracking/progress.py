"""How far a piece of work is: a live bar on a terminal, a line now and then in a job's log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, TextIO, cast

from pipeline.tracking.library_output import ConsoleOfOurs

LINE_PERIOD_S = 5.0
"""Seconds between two lines in a log, at least."""


class Display(Protocol):
    """Shows the latest state of one piece of work."""

    def show(self, done: int, words: str, news: str, left_s: float) -> None:
        """
        Args:
            done: steps done.
            words: the numbers that matter now.
            news: the numbers of an evaluation, empty in a step without one.
            left_s: seconds left.
        """

    def close(self) -> None: ...


class LogLines:
    """For a stream that keeps every line. Shows the last step, those with news, and else one step in every period."""

    def __init__(self, name: str, total: int, stream: TextIO, clock: Callable[[], float]) -> None:
        self._name = name
        self._total = total
        self._stream = stream
        self._clock = clock
        self._shown = clock()

    def show(self, done: int, words: str, news: str, left_s: float) -> None:
        now = self._clock()
        if now - self._shown < LINE_PERIOD_S and done < self._total and not news:
            return
        self._shown = now
        position = f"{done:,}/{self._total:,}"
        told = "  ".join(part for part in (words, news, f"{as_clock(left_s)} left") if part)
        print(f"{self._name:<19} {position:>9}  {told}", file=self._stream, flush=True)

    def close(self) -> None:
        """Every line is written."""


class LiveBar:
    """For a terminal: one line that is drawn anew. It keeps the news of the last evaluation.

    Lines that others print meanwhile stand above it.
    """

    def __init__(self, name: str, total: int, stream: TextIO, *, done: int) -> None:
        # Imported here: only a terminal needs it.
        from rich.console import Console
        from rich.file_proxy import FileProxy
        from rich.progress import BarColumn, Progress, TextColumn

        self._ours = stream if isinstance(stream, ConsoleOfOurs) else None
        self._file = stream if self._ours is None else self._ours.console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.completed:,}/{task.total:,}  {task.fields[told]}", markup=False),
            console=Console(file=self._file, force_terminal=True, highlight=False),
            redirect_stdout=self._ours is None,
            redirect_stderr=self._ours is None,
        )
        self._task = self._bar.add_task(name, total=total, completed=done, told="")
        self._news = ""
        self._bar.start()
        if self._ours is not None:
            # Not by rich, which would redirect what libraries print too.
            self._ours.console = cast(TextIO, FileProxy(self._bar.console, self._file))

    def show(self, done: int, words: str, news: str, left_s: float) -> None:
        self._news = news or self._news
        told = "  ".join(part for part in (words, self._news, f"{as_clock(left_s)} left") if part)
        self._bar.update(self._task, completed=done, told=told)

    def close(self) -> None:
        if self._ours is not None:
            self._ours.console.flush()
            self._ours.console = self._file
        self._bar.stop()


class Progress:
    """Steps of one piece of work, shown where the user looks; estimates the time that is left."""

    def __init__(
        self,
        name: str,
        total: int,
        *,
        done: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            name: the stage or the job.
            total: steps of the whole work.
            done: steps done before, by an earlier attempt.
            stream: where to show it; standard output unless given.
            clock: seconds since some moment.
        """
        stream = sys.stdout if stream is None else stream
        self._total = total
        self._done_before = done
        self._clock = clock
        self._started = clock()
        is_terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._display: Display = (
            LiveBar(name, total, stream, done=done) if is_terminal else LogLines(name, total, stream, clock)
        )

    @property
    def seconds(self) -> float:
        """Since this attempt began."""
        return self._clock() - self._started

    def show(self, done: int, words: str, *, news: str = "") -> None:
        """Shows that `done` steps are done, with the numbers that matter and those of an evaluation, in words."""
        left_s = self.seconds / max(1, done - self._done_before) * (self._total - done)
        self._display.show(done, words, news, left_s)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.close()


def as_number(value: float) -> str:
    """0.12345 -> "0.1235", 1830.4 -> "1,830"."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def as_clock(seconds: float) -> str:
    """3725.0 -> "1:02:05", 65.0 -> "1:05"."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"
