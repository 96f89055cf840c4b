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
    """Of the stage's code: raised by hand whenever it computes something else."""
    config: Mapping[str, Any]
    """JSON-able slice of the recipe that the stage reads."""
    inputs: tuple[str, ...] = ()
    """Fingerprints of the results of earlier stages that the stage reads."""
    data: tuple[str, ...] = ()
    """Content fingerprints of files that the stage reads."""
    keep_checkpoints: int = 2
    keep_best: str | None = None
    """Both as in `CheckpointStore`."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal results, wherever and by whomever they are computed."""
        return fingerprint(self.name, self.version, self.config, [*self.inputs, *self.data])
