"""What happens when a rollout worker dies, hangs or fails: a decision here, carried out by whoever holds the workers.

For a worker that serves:

    ============  =======  ======  ============  =======  =======
    during        start    sleep   load_weights  sample   advance
    ============  =======  ======  ============  =======  =======
    it died       replace  drop    replace       replace  replace
    it hangs      raise    drop    replace       replace  raise
    it failed     raise    drop    raise         raise    raise
    ============  =======  ======  ============  =======  =======

"failed" means that its code raised: another worker would raise the same. A worker replaced costs one restart of the
budget; without one left, the error is raised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.config.cluster import RolloutConfig
from pipeline.errors import DeadlineExceeded, WorkerDied

WorkerCall = Literal["start", "sleep", "load_weights", "sample", "advance"]
FailureKind = Literal["died", "hangs", "failed"]
Standing = Literal["serving", "joining", "left"]

REPLACED_WHEN_HANGING: frozenset[WorkerCall] = frozenset({"load_weights", "sample"})
"""A start that hangs mostly waits for room, which a second worker would lack, too. A stream ends with the error."""


@dataclass(frozen=True, kw_only=True)
class WorkerFailure:
    """What went wrong with one call to one worker."""

    call: WorkerCall
    kind: FailureKind
    error: Exception
    """What the user reads if the failure ends the run."""
    standing: Standing = "serving"
    """Whether the worker belongs to the pool, is about to join it, or has left it before."""
    is_awaited: bool = True
    """Whether anybody still waits for the answer of the call."""


@dataclass(frozen=True, kw_only=True)
class FailureDecision:
    """What to do about a failure."""

    action: Literal["replace", "drop", "raise"]
    """Start another worker in its place; go on without the worker, or without its answer; raise the error."""
    ends_worker: bool
    """End the worker's process first. One that seems dead may only be out of reach."""
    error: Exception
    """What to raise, or to name in the warning."""


def decide_on_failure(failure: WorkerFailure, *, restarts_left: int) -> FailureDecision:
    """The table above, and what differs for a worker that does not serve.

    A worker that joins is dropped: a request from outside must not end the run. A worker that has left the pool needs
    no replacement. An answer that nobody waits for may be an error.

    Args:
        restarts_left: how many workers may still be replaced.
    """
    error = failure.error
    if failure.standing == "joining" or failure.call == "sleep":
        return FailureDecision(action="drop", ends_worker=True, error=error)
    if failure.kind == "failed":
        return FailureDecision(action="raise" if failure.is_awaited else "drop", ends_worker=False, error=error)
    if failure.standing == "left":
        return FailureDecision(action="drop", ends_worker=False, error=error)
    if failure.kind == "hangs" and failure.call not in REPLACED_WHEN_HANGING:
        return FailureDecision(action="raise", ends_worker=False, error=error)
    return FailureDecision(action="replace" if restarts_left > 0 else "raise", ends_worker=True, error=error)


def worker_died(worker: str, doing: str, config: RolloutConfig) -> WorkerDied:
    """The error for a dead worker.

    Args:
        doing: the call, as the user shall read it: "sample()".
    """
    return WorkerDied(
        f"{worker} died during {doing}; the budget is {config.max_restarts} restarts "
        "(cluster.rollout.max_restarts). Often it ran out of memory: lower kv_cache_gib or max_sequences. The "
        "workspace is intact; the same command resumes."
    )


def deadline_exceeded(
    worker: str, doing: str, deadline_s: float, config: RolloutConfig, free: Mapping[str, float]
) -> DeadlineExceeded:
    """The error for a worker that does not answer.

    Args:
        doing: as in `worker_died`.
        free: the cluster's free resources, {"CPU": ..., "GPU": ...}.
    """
    return DeadlineExceeded(
        f"{worker}: {doing} did not return within {deadline_s:g} s. It hangs, is slow, or waits for a place "
        f"(it needs {config.cpus_per_worker:g} CPU and {config.gpus_per_worker or 0:g} GPU; "
        f"{free.get('CPU', 0):g} and {free.get('GPU', 0):g} are free). See its log; lower "
        "cluster.rollout.chunk_size or workers, or raise cluster.deadlines."
    )
