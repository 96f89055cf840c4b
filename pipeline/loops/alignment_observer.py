"""What looks at an alignment, and changes nothing in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.evaluation.overoptimization import GoldReward
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.loops.alignment_run import AlignmentRun
from pipeline.loops.validation import Validation
from pipeline.ports import BackgroundRolloutSource
from pipeline.records import Metrics, RewardScore, Rollout
from pipeline.stages.metrics_log import MetricsLog


@dataclass(frozen=True, kw_only=True)
class AlignmentObserver:
    """The gold reward and the validation of a run, as far as it has them."""

    gold: GoldReward | None = None
    validation: Validation | None = None

    def resume(self, run: AlignmentRun) -> None:
        """Before the first step of an attempt."""
        if self.validation is not None:
            self.validation.resume(run)

    def answers(self, run: AlignmentRun, step: int) -> list[Rollout]:
        """Held-out prompts, answered by the policy that `step` begins with; none where no validation is due."""
        return [] if self.validation is None else self.validation.answers(run, step)

    def validate(self, run: AlignmentRun, step: int, answers: Sequence[Rollout]) -> Metrics:
        """`eval/*` of the policy that `step` begins with; empty where no validation is due."""
        return {} if self.validation is None else self.validation.measure(run, step, answers)

    def measure(self, samples: Sequence[Rollout], scores: Sequence[RewardScore], reward_scale: RewardScale) -> Metrics:
        """The true reward of the rollouts of a step; empty where it is unknown."""
        if self.gold is None:
            return {}
        conversations, responses = [s.prompt.messages for s in samples], [s.response_text for s in samples]
        return self.gold.measure(conversations, responses, [score.mean for score in scores], reward_scale)

    def validate_finished(self, run: AlignmentRun, rollouts: BackgroundRolloutSource, log: MetricsLog) -> None:
        """Validates the policy after the last step, and writes that to a row of its own.

        Raises:
            Preempted: the process is about to be ended; the last step is committed.
        """
        if self.validation is None or run.ended_by_kl:
            return
        with run.given_up_if_preempted(run.num_steps):
            answers = self.answers(run, run.num_steps)
            rollouts.sleep()
            validated = self.validate(run, run.num_steps, answers)
        if validated:
            log.write(run.num_steps - 1, run.metrics)
