"""How many rollout workers a running job should have, from who waited for whom."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.config.cluster import AutoscaleConfig

logger = logging.getLogger(__name__)

MARGIN = 0.1
"""Share of the learner's time by which rollouts may be late before a worker is worth its resources."""


@dataclass(frozen=True, kw_only=True)
class RolloutWaits:
    """Who waited for whom over one batch that was sampled while the learner worked, in seconds."""

    rollout_s: float
    """Seconds from the first chunk handed out to the last one answered."""
    learner_wait_s: float
    """The learner was done and the batch was not."""
    queue_wait_s: float
    """The batch was done and the learner was not."""

    @property
    def learner_s(self) -> float:
        """How long the learner worked: from the start of the batch until it waited for the batch."""
        return self.rollout_s + self.queue_wait_s - self.learner_wait_s


@dataclass(frozen=True, kw_only=True)
class ScalingDecision:
    """What to do about the size of the pool; whoever holds the pool does it."""

    workers: int
    reason: str


def decide_workers(
    waits: RolloutWaits, *, workers: int, config: AutoscaleConfig, since_change_s: float
) -> ScalingDecision:
    """The fewest workers whose rollouts take about as long as the learner does.

    n' = ceil(n R / ((1 + margin) U)),  R the rollout's and U the learner's seconds: the work is n R worker-seconds.
    Between the bounds; unchanged during the cool-down, and where nothing overlapped (U = 0).

    Args:
        waits: waits of the last batch, sampled by `workers`.
        since_change_s: seconds since the last decision to change, infinite if there was none.
    """
    least, most = config.min_workers, config.max_workers
    bounded = min(max(workers, least), most)
    if bounded != workers:
        return ScalingDecision(workers=bounded, reason=f"{workers} is outside of {least} to {most}")
    if since_change_s < config.cooldown_s:
        return ScalingDecision(
            workers=workers, reason=f"changed {since_change_s:.0f} s ago, cool-down is {config.cooldown_s:g} s"
        )
    if waits.learner_s <= 0.0:
        return ScalingDecision(workers=workers, reason="the learner did nothing meanwhile that could be compared")
    wanted = math.ceil(workers * waits.rollout_s / ((1.0 + MARGIN) * waits.learner_s))
    waited = (
        f"the learner waited {waits.learner_wait_s:.1f} s for rollouts and they {waits.queue_wait_s:.1f} s for it "
        f"(rollout {waits.rollout_s:.1f} s, learner {waits.learner_s:.1f} s)"
    )
    bounded = min(max(wanted, least), most)
    at_bound = "" if bounded == wanted else f"; {wanted} would balance them, the bounds are {least} to {most}"
    return ScalingDecision(workers=bounded, reason=waited + at_bound)


class Autoscaler:
    """Decides between batches; remembers the last change and its time."""

    def __init__(self, config: AutoscaleConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._changed = -math.inf
        self._target: int | None = None

    def target_workers(self, workers: int, waits: RolloutWaits | None) -> int | None:
        """How many workers there should be; a change is logged with its reason. None as long as nothing need change.

        Args:
            workers: those that sampled the last batch; one that is still starting does not count.
            waits: waits of that batch; None where it was not sampled while the learner worked.
        """
        if waits is not None:
            now = self._clock()
            decision = decide_workers(waits, workers=workers, config=self._config, since_change_s=now - self._changed)
            if decision.workers not in (workers, self._target):  # the target's may still be starting
                self._changed, self._target = now, decision.workers
                logger.warning("rollout workers %d -> %d: %s", workers, decision.workers, decision.reason)
        return self._target
