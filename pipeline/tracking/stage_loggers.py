"""The loggers of one stage, as the recipe names them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline.tracking.background_logger import BackgroundLogger
from pipeline.tracking.logger_process import ProcessLogger
from pipeline.tracking.loggers import TensorBoardLogger
from pipeline.tracking.metrics_logger import LoggedRun, RunLogger

PRINTED_FILE = "loggers.log"


@dataclass(frozen=True, kw_only=True)
class StageLogging:
    """Which loggers a stage has, and what they are told of it."""

    names: tuple[str, ...] = ("tensorboard",)
    project: str = "vrm"
    """The recipe's name."""
    group: str = "run"
    """What all stages of a workspace share."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The part of the recipe that the stage reads."""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunIds:
    """Where a stage keeps the ids of its runs, by logger."""

    read: Callable[[str], str | None]
    write: Callable[[str, str], None]


def group_name(workspace_uri: str) -> str:
    """The last part of a workspace's address, and enough of a hash to tell it from others of that name."""
    name = workspace_uri.rstrip("/").rpartition("/")[2]
    return f"{name}-{hashlib.sha256(workspace_uri.encode()).hexdigest()[:6]}"


def start_loggers(
    logging: StageLogging,
    stage: str,
    directory: str,
    *,
    first_step: int,
    run_ids: RunIds,
) -> list[BackgroundLogger]:
    """Starts every logger in the background; returns at once.

    Args:
        directory: a local directory for event files and for what the libraries print.
        first_step: the step from which this attempt of the stage goes on.
    """
    started = []
    for name in logging.names:
        run = LoggedRun(
            project=logging.project,
            group=logging.group,
            stage=stage,
            run_id=run_ids.read(name),
            first_step=first_step,
            config=dict(logging.config),
            versions=dict(logging.versions),
        )
        started.append(
            BackgroundLogger(
                name,
                _logger(name, run, directory),
                keep_run_id=partial(run_ids.write, name),
                say=lambda line: print(f"{stage:<19} {line}", flush=True),
            )
        )
    return started


def _logger(name: str, run: LoggedRun, directory: str) -> RunLogger:
    if name == "tensorboard":
        return TensorBoardLogger(os.path.join(directory, "tensorboard"), run)
    return ProcessLogger(name, run, os.path.join(directory, PRINTED_FILE))
