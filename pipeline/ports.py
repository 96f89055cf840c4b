"""What the loops need from the outside world, as protocols.

The same loop runs against fakes in milliseconds, against one process with `TorchEngine`, and
against DeepSpeed, vLLM and Ray Serve under Ray.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from pipeline.records import (
    DirectBatch,
    ExperienceSummary,
    Message,
    Metrics,
    PolicyWeights,
    Prompt,
    PromptGroup,
    ResponseEvaluations,
    RewardedRows,
    RewardScore,
    Rollout,
    SamplingParams,
    ScoredRollouts,
)

if TYPE_CHECKING:
    import torch

    from pipeline.columns import Rollouts

Batch = TypeVar("Batch", contravariant=True)

Evaluated = TypeVar("Evaluated")
"""The learner's reference to rollouts and to what it says of their tokens; in one process the records themselves."""

Built = TypeVar("Built")
"""The learner's reference to an experience; in one process the experience itself."""


class Snapshot(Protocol):
    """What a resumed run needs, copied out of a learner that trains on."""

    def write(self, uri: str) -> None:
        """Writes a resumable checkpoint; every rank writes its part."""


class Learner(Protocol[Batch]):
    """A model under supervised training (a reward model on pairs, a policy on texts)."""

    def restore(self, checkpoint: str) -> None:
        """Loads weights and optimiser from a committed checkpoint directory."""

    def update(self, batch: Batch, step: int) -> Metrics:
        """One optimiser step on the whole batch; consumes it, returns metrics of the whole batch."""

    def evaluate(self, batch: Batch) -> Metrics:
        """Metrics of a held-out batch; changes nothing."""

    def snapshot(self) -> Snapshot:
        """Copies the state to host memory; writing it is left to the snapshot."""

    def export(self, directory: str) -> None:
        """Writes the model alone, as safetensors and json."""

    def peak_memory(self) -> Metrics:
        """The most memory that a process of the learner has taken so far, `memory/*`."""


class CalibratedLearner(Learner[Batch], Protocol[Batch]):
    """A reward model: when it is finished, it is calibrated."""

    def calibrate(self, batches: Sequence[Batch], heldout: Batch, mismatched: Batch | None) -> Metrics:
        """Fits error bars to training batches, and the calibration to a part of the held-out batch.

        Args:
            mismatched: held-out chosen responses against some that were chosen for other prompts; None without any.

        Returns:
            What `evaluate` returns, with the metrics of the calibrated model.
        """


class DirectLearner(Learner[DirectBatch], Protocol):
    """A policy under direct alignment."""

    def logprobs(self, groups: Sequence[PromptGroup]) -> torch.Tensor:
        """[B, k] float32 on the CPU: log pi(y|x) of every response, summed over its tokens. Changes nothing."""


class PolicyLearner(Protocol[Evaluated, Built]):
    """The policy, its critic and its frozen reference.

    What it says of tokens stays where it computed that. Its caller holds a reference, and a few numbers a response.
    """

    def restore(self, checkpoint: str) -> None: ...

    def evaluate(self, rollouts: Rollouts) -> tuple[Evaluated, ResponseEvaluations]:
        """Policy and reference logprobs and values of every response token; the responses in the order given."""

    def build_experience(
        self, evaluated: Evaluated, rewarded: RewardedRows, *, kl_coefficient: float
    ) -> tuple[Built, ExperienceSummary]:
        """Estimates the advantage of every token (`pipeline.learning.experience`).

        Args:
            rewarded: the rows of `evaluated` to learn from.
            kl_coefficient: beta of this step.
        """

    def update(self, experience: Built, step: int) -> Metrics:
        """All PPO epochs over one batch."""

    def publish_weights(self, version: int) -> PolicyWeights:
        """Makes the current policy readable by rollout workers, with the probes of the gate."""

    def snapshot(self) -> Snapshot: ...

    def export(self, directory: str) -> None: ...

    def peak_memory(self) -> Metrics: ...


class RolloutSource(Protocol):
    """Samples responses with the policy it was last given."""

    def load_weights(self, weights: PolicyWeights) -> Metrics:
        """Loads a published policy into every engine and passes the numerics gate.

        Raises StaleEngineError when an engine does not reproduce the learner's probe logprobs.
        """

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Rollouts:
        """`samples_per_prompt` rollouts per prompt, ordered by (prompt, sample), whoever sampled them."""


class BackgroundRolloutSource(RolloutSource, Protocol):
    """Samples while its caller does something else, loading weights included."""

    def sleep(self) -> None:
        """Leaves GPUs that are shared with the learner to it, until the next `load_weights`."""

    def begin(self, prompts: Sequence[Prompt], sampling: SamplingParams, *, resample_unfinished: bool) -> None:
        """Starts what `generate` does and returns at once; a batch begun before and not collected is abandoned.

        Weights may be loaded meanwhile. Responses that have not begun are then sampled from the new policy. Unfinished
        responses are continued by the new policy, or with `resample_unfinished` sampled again from their beginning.
        Every rollout names the policy of its first token.
        """

    def collect(self) -> Rollouts:
        """The rollouts of the batch that was begun; waits for them."""


class RolloutStream(Protocol):
    """Samples responses as they are asked for."""

    def stream(self, waiting: deque[tuple[Prompt, SamplingParams]]) -> Iterator[Rollout]:
        """One rollout for each prompt, as it finishes; consumes `waiting`, which may grow while they are read."""


class RewardScorer(Protocol):
    """The reward model as a function."""

    def score(self, prompts: Sequence[tuple[Message, ...]], responses: Sequence[str]) -> list[RewardScore]:
        """One score per (prompt, response), in order, independent of what shared a batch."""


class RewardSources(Protocol):
    """All rewards of a run together: a reward model, functions, judges, and their combination."""

    def score(self, rollouts: Rollouts) -> ScoredRollouts:
        """Scores of B rollouts, in order.

        Raises WorkerError where not one of them can be trained on.
        """
