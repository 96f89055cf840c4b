"""The loggers themselves. Each imports its library where it is opened."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from pipeline.tracking.metrics_logger import LoggedRun, MetricsLogger, OpenLogger, flattened

if TYPE_CHECKING:
    from pipeline.records import Metrics  # imports torch, which a logger's process does without


class TensorBoardLogger:
    """Event files in a local directory."""

    def __init__(self, directory: str, run: LoggedRun) -> None:
        self._directory = directory
        self._run = run

    def open(self) -> str:
        # It imports torch, and `jobs/status.py` reads metrics without writing any.
        from tensorboardX import SummaryWriter

        run = self._run
        self._writer = SummaryWriter(
            self._directory,
            purge_step=run.first_step,
            write_to_disk=True,
            # Two attempts within a second would otherwise have one file.
            filename_suffix=f".from-step-{run.first_step}",
        )
        if run.run_id is None:
            for name, values in (("config", flattened(run.config)), ("versions", run.versions)):
                self._writer.add_text(name, "\n".join(f"    {key} = {value}" for key, value in values.items()))
        return run.name

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()

    def give_up(self) -> None:
        """It writes local files: there is nothing that it could wait for."""


class WandbLogger:
    """Weights & Biases; its own environment variables say where and how, as WANDB_MODE=offline.

    The server ignores a step that it has: a resumed run adds only what is new.
    """

    def __init__(self, run: LoggedRun) -> None:
        import wandb

        self.run_id = run.run_id or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            id=self.run_id,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", run.project),
            group=run.group,
            job_type=run.stage,
            name=run.name,
            config={**run.config, "versions": dict(run.versions)},
            settings=wandb.Settings(console="off", silent=True, disable_git=True),
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowLogger:
    """MLflow at MLFLOW_TRACKING_URI: an experiment for each recipe, a run for each stage."""

    PARAMETERS_AT_ONCE = 100
    METRICS_AT_ONCE = 1000
    """What MLflow takes in one call (its REST documentation, runs/log-batch)."""

    def __init__(self, run: LoggedRun) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        if run.run_id is not None:
            self.run_id = run.run_id
            self._client.update_run(self.run_id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", run.project)
        experiment = self._client.get_experiment_by_name(name)
        place = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        tags = {"group": run.group, "stage": run.stage}
        self.run_id = self._client.create_run(place, run_name=run.name, tags=tags).info.run_id
        self._log_parameters({**flattened(run.config), **flattened(run.versions, "versions.")})

    def _log_parameters(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        parameters = iter([Param(key, str(value)) for key, value in values.items()])
        for some in _parts(parameters, self.PARAMETERS_AT_ONCE):
            self._client.log_batch(self.run_id, params=some)

    def log(self, step: int, metrics: Metrics) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        values = iter([Metric(name, value, now_ms, step) for name, value in metrics.items()])
        for some in _parts(values, self.METRICS_AT_ONCE):
            self._client.log_batch(self.run_id, metrics=some)

    def close(self) -> None:
        self._client.set_terminated(self.run_id)


class TrackioLogger:
    """Trackio: files in TRACKIO_DIR, or a Space that TRACKIO_SPACE_ID names."""

    def __init__(self, run: LoggedRun) -> None:
        import trackio

        # Trackio finds a run again by its name, so the name of a new run must be new.
        self.run_id = run.run_id or f"{run.name}-{uuid.uuid4().hex[:4]}"
        self._run = trackio.init(
            project=run.project,
            name=self.run_id,
            group=run.group,
            resume="never" if run.run_id is None else "must",
            config={**flattened(run.config), **flattened(run.versions, "versions.")},
            embed=False,
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def _parts(values: Iterator[Any], count: int) -> Iterator[list[Any]]:
    while some := list(islice(values, count)):
        yield some


PROCESS_LOGGERS: dict[str, OpenLogger] = {"wandb": WandbLogger, "mlflow": MlflowLogger, "trackio": TrackioLogger}
"""Loggers that get a process of their own: their libraries print, start threads, ask questions and wait at exit."""


def open_in_process(name: str, run: LoggedRun) -> MetricsLogger:
    """The logger `name`, in this process."""
    return PROCESS_LOGGERS[name](run)
