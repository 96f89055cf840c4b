"""What a stage is, before it is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.stages.fingerprint import fingerprint


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """What a stage's result depends on, and which of its checkpoints are kept on the way."""

    name: str
    version: int
    """Version of the stage's code, raised by hand whenever the stage computes something else."""
    config: Mapping[str, Any]
    """JSON-able slice of the recipe that the stage reads."""
    inputs: tuple[str, ...] = ()
    """Fingerprints of the results of earlier stages that the stage reads."""
    data: tuple[str, ...] = ()
    """Content fingerprints of files that the stage reads."""
    keep_checkpoints: int = 2
    """How many of the newest commits are kept."""
    keep_best: str | None = None
    """The metric by which the best commit is kept too, as `CheckpointStore` reads it."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal results, wherever and by whomever they are computed."""
        return fingerprint(self.name, self.version, self.config, [*self.inputs, *self.data])
