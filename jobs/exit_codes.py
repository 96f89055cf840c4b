"""How every command ends: with its result, or with the message of the error alone, and an exit code.

0 is done. 2 is bad input, or a failure that the message explains. 75 is a process that was asked to end and has
committed what the grace time allowed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import PipelineError, Preempted

BAD_INPUT = 2
PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: try again."""


@contextmanager
def exit_codes() -> Iterator[None]:
    """Ends the process with the exit code of a pipeline error, and prints its message. Other errors travel."""
    try:
        yield
    except Preempted as notice:
        print(notice, file=sys.stderr, flush=True)
        sys.exit(PREEMPTED)
    except PipelineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(BAD_INPUT)
