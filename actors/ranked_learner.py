"""A group of ranks as one learner: every rank gets the whole batch and trains on its own share of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from actors.rank_group import RankGroup, gather
from cluster.rollout_plan import WeightReceivers
from pipeline.config.cluster import DeadlinesConfig
from pipeline.errors import TransferFailed
from pipeline.learning.memory import largest
from pipeline.records import (
    ExperienceSummary,
    Metrics,
    PolicyWeights,
    PromptGroup,
    ResponseEvaluations,
    RewardedRows,
)

if TYPE_CHECKING:
    import torch

    from pipeline.columns import Rollouts


class RankedLearner:
    """Implements `Learner` over ranks that each have a learner."""

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

    def calibrate(self, batches: Sequence[Any], heldout: Any, mismatched: Any) -> Metrics:
        references = ray.put(batches), ray.put(heldout), ray.put(mismatched)
        return self._all(lambda rank: rank.calibrate.remote(*references), "calibrating")

    def snapshot(self) -> RankedSnapshot:
        self._all(lambda rank: rank.snapshot.remote(), "copying its state")
        return RankedSnapshot(self._group, self._deadline_s)

    def export(self, directory: str) -> None:
        self._all(lambda rank: rank.export.remote(directory), f"exporting to {directory}")

    def peak_memory(self) -> Metrics:
        """The largest values of any rank (`pipeline.learning.memory`)."""
        doing = "reporting its memory"
        return largest(
            self._group.all(lambda rank: rank.peak_memory.remote(), doing=doing, deadline_s=self._deadline_s)
        )

    def _all(self, call: Callable[[Any], Any], doing: str) -> Any:
        """Calls every rank. Returns the result of rank 0, which equals that of every rank."""
        return self._group.all(call, doing=doing, deadline_s=self._deadline_s)[0]


class RankedDirectLearner(RankedLearner):
    """Implements `DirectLearner` over ranks that each have a learner."""

    def logprobs(self, groups: Sequence[PromptGroup]) -> torch.Tensor:
        reference = ray.put(groups)
        return self._all(lambda rank: rank.logprobs.remote(reference), f"measuring {len(groups)} prompts")


class RankedSnapshot:
    """A copy of the learner's state, of which each rank keeps its part in memory.

    Implements `Snapshot`. `write` may run in another thread than the learner's calls: the ranks write in threads of
    their own, too.
    """

    def __init__(self, group: RankGroup, deadline_s: float) -> None:
        self._group = group
        self._deadline_s = deadline_s

    def write(self, directory: str) -> None:
        self._group.all(
            lambda rank: rank.write_snapshot.remote(directory),
            doing=f"writing {directory}",
            deadline_s=self._deadline_s,
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationReference:
    """Where Ray keeps the rollouts of a step, and what the ranks say of their tokens."""

    rollouts: ray.ObjectRef
    tokens: ray.ObjectRef


class RankedPolicyLearner(RankedLearner):
    """Implements `PolicyLearner` over ranks that each have a learner.

    What the first rank says of tokens stays in the memory that Ray shares between the processes of a node. The driver
    holds references and passes them on; it never reads the numbers.
    """

    def __init__(self, group: RankGroup, deadlines: DeadlinesConfig, *, sends_weights: bool = False) -> None:
        """`sends_weights`: a `RankedSender` of this group brings the weights to the engines. Then the file follows."""
        super().__init__(group, deadlines)
        self._sends_weights = sends_weights

    def evaluate(self, batch: Rollouts) -> tuple[EvaluationReference, ResponseEvaluations]:
        rollouts, tokens = ray.put(batch), []

        def evaluate(rank: Any) -> Any:
            tokens_of_rank, responses = rank.evaluate_rollouts.remote(rollouts)
            tokens.append(tokens_of_rank)
            return responses

        responses = self._all(evaluate, "evaluating")
        return EvaluationReference(rollouts=rollouts, tokens=tokens[0]), responses

    def build_experience(
        self, evaluated: EvaluationReference, rewarded: RewardedRows, *, kl_coefficient: float
    ) -> tuple[ray.ObjectRef, ExperienceSummary]:
        """Asks the first rank, whose result every rank reads."""
        experience, summary = self._group.first.build_experience.remote(
            evaluated.rollouts, evaluated.tokens, rewarded, kl_coefficient
        )
        [built] = gather([summary], who=self._group.name, doing="building experience", deadline_s=self._deadline_s)
        return experience, built

    def update(self, batch: ray.ObjectRef, step: int) -> Metrics:
        """Updates with an experience that a rank has built."""
        return self._all(lambda rank: rank.update.remote(batch, step), f"updating at step {step}")

    def publish_weights(self, version: int) -> PolicyWeights:
        follows = self._sends_weights
        return self._all(
            lambda rank: rank.publish_weights.remote(version, file_follows=follows),
            f"publishing policy version {version}",
        )


class RankedSender:
    """The driver's end of a transfer between GPUs: connects learner and rollout workers, again when workers change."""

    def __init__(self, group: RankGroup, receivers: WeightReceivers, *, deadline_s: float) -> None:
        self._group = group
        self._receivers = receivers
        self._deadline_s = deadline_s
        self._connected: tuple[str, ...] = ()
        """Names of the workers that the learner can send to; none after a failure."""

    def send(self, workers: Mapping[str, Any]) -> None:
        """Sends the published policy from the learner's GPUs, which still have it, into every engine.

        Args:
            workers: name -> Ray handle of a worker that has started and is idle.

        Raises:
            TransferFailed: an engine did not take it; the workers read the published file, as after any other failure.
                The learner has begun to write the file, if it had not before.
            WorkerDied, DeadlineExceeded: the learner died or hangs.
        """
        try:
            self._send(workers)
        except TransferFailed:
            self._all(lambda rank: rank.write_due_file.remote(), "writing the policy that was not sent")
            raise

    def _send(self, workers: Mapping[str, Any]) -> None:
        names = tuple(workers)
        if names != self._connected:
            self._connected = ()
            address = self._group.free_address("meeting the rollout workers", deadline_s=self._deadline_s)
            self._all(
                lambda rank: rank.meet_engines.remote(
                    self._receivers, list(workers.values()), address, self._deadline_s
                ),
                "meeting the rollout workers",
            )
        # Connected again only after success: a sender that failed cannot be used again.
        self._connected = ()
        self._all(lambda rank: rank.send_weights.remote(), "sending weights to the rollout workers")
        self._connected = names

    def _all(self, call: Callable[[Any], Any], doing: str) -> None:
        # Twice the deadline of the first rank, which itself reports engines that do not answer.
        self._group.all(call, doing=doing, deadline_s=2 * self._deadline_s)
