"""The port behind which loggers stand: TensorBoard in this process, the others each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pipeline.records import Metrics  # imports torch, which a logger's process does without


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """What a logger is told once, when it opens the run of a stage. All of it can be written as JSON."""

    project: str
    """The recipe's name."""
    group: str
    """The run name that all stages of a workspace share."""
    stage: str
    run_id: str | None
    """The logger's name for the run that an earlier attempt of this stage began; None for a new run."""
    first_step: int
    """Rows of earlier steps are already in the run; rows of this step and later may be in it too."""
    config: Mapping[str, Any]
    """The part of the recipe that the stage reads."""
    versions: Mapping[str, str]
    """Installed packages."""

    @property
    def name(self) -> str:
        """Of the run: stages have step axes of their own, so each stage is one run."""
        return f"{self.group}/{self.stage}"


class MetricsLogger(Protocol):
    """The run of one stage in one library. Any method may raise, or take long."""

    run_id: str
    """By which a resumed stage continues the run."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Adds the numbers of a step, which is counted as in metrics.jsonl: from 0, over all attempts of the stage."""

    def close(self) -> None:
        """Writes what is not written."""


class RunLogger(Protocol):
    """A logger as a run sees it: not opened yet, and it can be given up."""

    def open(self) -> str:
        """Returns the run id; called once, first."""

    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...

    def give_up(self) -> None:
        """Ends it, whatever it waits for. The only method that another thread may call."""


OpenLogger = Callable[[LoggedRun], MetricsLogger]


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"ppo": {"epochs": 2}} -> {"ppo.epochs": 2}, for loggers that know no sections."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= flattened(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
