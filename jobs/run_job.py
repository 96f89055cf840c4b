"""How every job of the pipeline starts and ends."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from jobs.command_line import Command, add_job_options, job_options, print_dry_run
from jobs.preflight import check_recipe

if TYPE_CHECKING:
    from jobs.open_job import Job


def job_command(documentation: str, body: Callable[[Job], object], *, recipe_flag: str = "--recipe") -> Command:
    """The command line of a job that works in a workspace.

    Args:
        body: the job, once workspace and cluster are open.
        recipe_flag: "recipe" takes the recipe as the first word instead of as an option.
    """

    def run(parsed: argparse.Namespace) -> None:
        options = job_options(parsed)
        if options.dry_run:
            print_dry_run(options)
            return
        check_recipe(options.recipe, workspace=options.workspace)
        # Ray and torch are imported behind the dry run, and behind what is wrong with the input.
        from jobs.open_job import open_job

        with open_job(options) as job:
            body(job)

    return Command(documentation=documentation, add_options=partial(add_job_options, recipe_flag=recipe_flag), run=run)


def run_job(documentation: str, body: Callable[[Job], object]) -> None:
    """Parses, opens workspace and cluster, runs `body`, and ends the process as `jobs/exit_codes.py` says."""
    job_command(documentation, body)()
