"""What libraries print goes to a file, what the pipeline prints goes to the console."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO, cast

from pipeline.errors import Preempted

OWN_PACKAGES = frozenset({"pipeline", "actors", "cluster", "jobs", "vrm", "__main__", "rich"})
"""The packages whose lines the user wants to read. `rich` draws the progress for them."""

STANDARD_OUTPUT, STANDARD_ERROR = 1, 2


class ConsoleOfOurs:
    """Takes the place of `sys.stdout` or `sys.stderr`. It sends a line to the console only if our code printed it.

    Libraries print from anywhere and without a switch: DeepSpeed at its import, Ray and Serve as they connect.
    """

    def __init__(self, console: TextIO, file: TextIO) -> None:
        self.console = console
        self.file = file

    def write(self, text: str) -> int:
        """`print` is no frame of its own, so the frame above is the code that printed."""
        package = str(sys._getframe(1).f_globals.get("__name__", "")).partition(".")[0]
        return (self.console if package in OWN_PACKAGES else self.file).write(text)

    def flush(self) -> None:
        self.console.flush()
        self.file.flush()

    def isatty(self) -> bool:
        return self.console.isatty()

    def fileno(self) -> int:
        """Of the file: what writes to descriptors is a library."""
        return self.file.fileno()

    @property
    def encoding(self) -> str:
        return self.console.encoding


@contextlib.contextmanager
def library_output_to(path: str) -> Iterator[TextIO]:
    """Appends to `path` what libraries print in this process while the block runs, their C code included.

    When the block fails, the user is told where the file is.

    Yields:
        The file, for notes to who will read it.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # With its first message Ray puts a function of its own in place of `print`: each of our lines would be Ray's.
    os.environ["RAY_TQDM_PATCH_PRINT"] = "0"
    stdout, stderr = sys.stdout, sys.stderr
    stdout.flush()
    stderr.flush()
    with contextlib.ExitStack() as exits:
        file = exits.enter_context(open(path, "a", encoding="utf-8", buffering=1, errors="backslashreplace"))
        kept_output, kept_error = os.dup(STANDARD_OUTPUT), os.dup(STANDARD_ERROR)
        try:
            # Handlers that libraries opened before hold these descriptors.
            os.dup2(file.fileno(), STANDARD_OUTPUT)
            os.dup2(file.fileno(), STANDARD_ERROR)
            output = _console(stdout, STANDARD_OUTPUT, exits.enter_context(_writer(kept_output)))
            error = _console(stderr, STANDARD_ERROR, exits.enter_context(_writer(kept_error)))
            sys.stdout, sys.stderr = (cast(TextIO, ConsoleOfOurs(console, file)) for console in (output, error))
            yield file
        except Preempted:
            raise
        except Exception:
            print(f"What the libraries printed is in {path}", file=sys.stderr, flush=True)
            raise
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            sys.stdout, sys.stderr = stdout, stderr
            os.dup2(kept_output, STANDARD_OUTPUT)
            os.dup2(kept_error, STANDARD_ERROR)


def _console(stream: TextIO, descriptor: int, kept: TextIO) -> TextIO:
    """Where the user looks: behind the descriptor, unless somebody has put another stream in its place."""
    try:
        return kept if stream.fileno() == descriptor else stream
    except OSError:
        return stream


def _writer(descriptor: int) -> TextIO:
    return open(descriptor, "w", encoding="utf-8", buffering=1, errors="backslashreplace")
