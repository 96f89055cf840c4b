"""A group of ranks as one learner: every rank gets the whole batch and takes its own share of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from actors.rank_group import RankGroup
from pipeline.config.cluster import DeadlinesConfig, WeightTransfer
from pipeline.learning.memory import largest
from pipeline.records import Experience, Metrics, PolicyWeights, Rollout, TokenEvaluation


class RankedLearner:
    """Implements `Learner` over ranks that each hold one."""

    def __init__(self, group: RankGroup, deadlines: DeadlinesConfig) -> None:
        self._group = group
        self._deadline_s = deadlines.update_s

    def restore(self, checkpoint: str) -> None:
        self._all(lambda rank: rank.restore.remote(checkpoint), f"restoring {checkpoint}")

    def update(self, batch: Any, step: int) -> Metrics:
        reference = ray.put(batch)
        return self._all(lambda rank: rank.update.remote(reference, step), f"updating at step {step}")

    def evaluate(self, batch: Any) -> Any:
        reference = ray.put(batch)
        return self._all(lambda rank: rank.evaluate.remote(reference), "evaluating")

    def snapshot(self) -> RankedSnapshot:
        self._all(lambda rank: rank.snapshot.remote(), "copying its state")
        return RankedSnapshot(self._group, self._deadline_s)

    def export(self, directory: str) -> None:
        self._all(lambda rank: rank.export.remote(directory), f"exporting to {directory}")

    def peak_memory(self) -> Metrics:
        """Of the rank that needed most (`pipeline.learning.memory`)."""
        doing = "reporting its memory"
        return largest(
            self._group.all(lambda rank: rank.peak_memory.remote(), doing=doing, deadline_s=self._deadline_s)
        )

    def _all(self, call: Callable[[Any], Any], doing: str) -> Any:
        """Rank 0 speaks for all: results are equal on every rank."""
        return self._group.all(call, doing=doing, deadline_s=self._deadline_s)[0]


class RankedSnapshot:
    """The copies that lie with the ranks. Implements `Snapshot`, and may be written from another thread."""

    def __init__(self, group: RankGroup, deadline_s: float) -> None:
        self._group = group
        self._deadline_s = deadline_s

    def write(self, directory: str) -> None:
        self._group.all(
            lambda rank: rank.write_snapshot.remote(directory),
            doing=f"writing {directory}",
            deadline_s=self._deadline_s,
        )


class RankedPolicyLearner(RankedLearner):
    """Implements `PolicyLearner` over ranks that each hold one."""

    def update(self, batch: Experience, step: int) -> Metrics:
        return super().update(batch, step)

    def evaluate(self, batch: Sequence[Rollout]) -> list[TokenEvaluation]:
        return super().evaluate(batch)

    def publish_weights(self, version: int) -> PolicyWeights:
        return self._all(lambda rank: rank.publish_weights.remote(version), f"publishing policy version {version}")


class RankedSender:
    """The driver's end: keeps learner and rollout workers introduced, and anew where either has changed."""

    def __init__(self, group: RankGroup, backend: WeightTransfer, *, dtype: str, deadline_s: float) -> None:
        self._group = group
        self._backend = backend
        self._dtype = dtype
        self._deadline_s = deadline_s
        self._met: tuple[str, ...] = ()

    def send(self, workers: Mapping[str, Any]) -> None:
        """Sends the published policy, from the GPUs on which it still is, into every engine.

        Args:
            workers: name -> Ray handle; idle, and up.

        Raises:
            TransferFailed: an engine did not take it; the workers read the published file, as after any other failure.
            WorkerDied, DeadlineExceeded: of the learner.
        """
        names = tuple(workers)
        if names != self._met:
            self._met = ()
            address = self._group.free_address("meeting the rollout workers", deadline_s=self._deadline_s)
            self._all(
                lambda rank: rank.meet_engines.remote(
                    self._backend, list(workers.values()), address, self._dtype, self._deadline_s
                ),
                "meeting the rollout workers",
            )
        self._met = ()
        self._all(lambda rank: rank.send_weights.remote(), "sending weights to the rollout workers")
        self._met = names

    def _all(self, call: Callable[[Any], Any], doing: str) -> None:
        # Twice: the first rank itself notices engines that do not answer.
        self._group.all(call, doing=doing, deadline_s=2 * self._deadline_s)
