"""Which steps of an alignment are recorded."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.config.base import Frozen


class ProfileConfig(Frozen):
    """Traces of steps of the alignment, for chrome://tracing or ui.perfetto.dev."""

    steps: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Steps to record, counted from 0 as in metrics.jsonl; [] records nothing and costs nothing. Of each step the stage
    keeps what the driver, the first rank and one engine did, with the phases rollout, score, evaluate, update and
    weights, and of the whole run Ray's timeline. Recording slows a step."""
