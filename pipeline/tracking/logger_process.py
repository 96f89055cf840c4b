"""A logger in a process of its own: what it prints, how it dies and how long it waits does not concern the run.

The two processes speak in lines of JSON. The run writes the `LoggedRun`, then one row a line; the logger answers every
line with its run id or with an error. When the run is gone its pipe ends, and the logger closes what it has.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from pipeline.tracking.loggers import open_in_process
from pipeline.tracking.metrics_logger import LoggedRun

if TYPE_CHECKING:
    from pipeline.records import Metrics  # imports torch, which a logger's process does without

ROOT = Path(__file__).parents[2]
"""From which `pipeline` is imported."""


class LoggerFailed(Exception):
    """The library behind a logger raised; the message is its own."""


class ProcessLogger:
    """The side of the run."""

    def __init__(self, name: str, run: LoggedRun, output: str) -> None:
        """
        Args:
            output: a file that gets what the library prints.
        """
        self._name = name
        self._run = run
        self._output = output
        self._process: subprocess.Popen[str] | None = None

    def open(self) -> str:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with open(self._output, "a", encoding="utf-8") as printed:
            self._process = subprocess.Popen(
                # -P: a file in the current directory may have the name of a module that is imported.
                [sys.executable, "-P", "-m", "pipeline.tracking.logger_process", self._name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                # A Ctrl-C of the terminal is for the run, which then closes its loggers.
                start_new_session=True,
            )
        try:
            return str(self._ask(asdict(self._run))["run_id"])
        except LoggerFailed:
            self._reap(self._process)
            raise

    def log(self, step: int, metrics: Metrics) -> None:
        self._ask({"step": step, "metrics": metrics})

    def close(self) -> None:
        """Waits until the library has written everything."""
        try:
            self._ask({"close": True})
        finally:
            if self._process is not None:
                self._reap(self._process)

    def give_up(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None, "open comes first"
        questions, answers = cast(TextIO, process.stdin), cast(TextIO, process.stdout)
        # A process that has ended has left its reason as its last answer, or none.
        with contextlib.suppress(BrokenPipeError):
            questions.write(json.dumps(message) + "\n")
            questions.flush()
        line = answers.readline()
        answer = json.loads(line) if line else {"error": f"its process ended with code {process.wait()}"}
        if "error" in answer:
            raise LoggerFailed(f"{answer['error']}; what it printed is in {self._output}")
        return answer

    @staticmethod
    def _reap(process: subprocess.Popen[str]) -> None:
        # What could not be written before cannot be written now.
        with contextlib.suppress(BrokenPipeError):
            cast(TextIO, process.stdin).close()
        cast(TextIO, process.stdout).close()
        process.wait()


def serve(name: str, questions: TextIO, answers: TextIO) -> None:
    """The side of the library, until the questions end."""

    def answer(**values: object) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        logger = open_in_process(name, LoggedRun(**json.loads(questions.readline())))
    except Exception as error:  # of any kind: these are other people's libraries
        answer(error=_in_a_line(error))
        return
    answer(run_id=logger.run_id)
    closed = False
    for line in questions:
        message = json.loads(line)
        closed = "close" in message
        try:
            logger.close() if closed else logger.log(message["step"], message["metrics"])
        except Exception as error:
            answer(error=_in_a_line(error))
        else:
            answer(run_id=logger.run_id)
    if not closed:  # the run was killed
        logger.close()


def _in_a_line(error: Exception) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}"


if __name__ == "__main__":
    # The library prints to the file; the answers have the pipe for themselves.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as pipe:
        os.dup2(2, 1)
        serve(sys.argv[1], sys.stdin, pipe)
