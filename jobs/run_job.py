"""How every job of the pipeline starts and ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from jobs.command_line import BAD_INPUT, PREEMPTED, dry_run, parse
from pipeline.errors import PipelineError, Preempted

if TYPE_CHECKING:
    from jobs.open_job import Job


def run_job(description: str, body: Callable[[Job], object]) -> None:
    """Parses, opens workspace and cluster, runs `body`; a pipeline error ends the process with its message alone.

    Exit codes: 0 done, 2 bad input or a failure the message explains, 75 asked to end, with what
    the grace time allowed committed.
    """
    try:
        options = parse(description)
        if options.dry_run:
            dry_run(options)
            return
        # Ray and torch are imported behind the dry run.
        from jobs.open_job import open_job

        with open_job(options) as job:
            body(job)
    except Preempted as notice:
        print(notice, file=sys.stderr, flush=True)
        sys.exit(PREEMPTED)
    except PipelineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(BAD_INPUT)
