"""What a driver knows of its own submission. Imports no ray: the command line asks before a dry run."""

from __future__ import annotations

import json
import os

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""The variable in which Ray gives a submitted job's driver its metadata; that is its whole name."""


def is_submitted_job() -> bool:
    """True in the driver of `ray job submit`, whose working directory is a temporary copy."""
    return JOB_CONFIG in os.environ


def job_id() -> str:
    """The submission id of a submitted job, or this process for a job run directly."""
    if not is_submitted_job():
        return f"local-{os.getpid()}"
    return json.loads(os.environ[JOB_CONFIG])["metadata"]["job_submission_id"]
