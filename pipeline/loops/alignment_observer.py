"""What looks at an alignment, and changes nothing in it."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.columns import Rollouts
from pipeline.evaluation.overoptimization import GoldReward
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.loops.alignment_run import AlignmentRun
from pipeline.loops.validation import Validation
from pipeline.ports import BackgroundRolloutSource
from pipeline.records import ExperienceSummary, Metrics, ResponseEvaluations, ScoredRollouts
from pipeline.rollouts.kept_rollouts import RolloutBatch, RolloutFiles
from pipeline.rollouts.prefetch import StepPlan
from pipeline.rollouts.requests import rollout_requests
from pipeline.stages.metrics_log import MetricsLog


@dataclass(frozen=True, kw_only=True)
class KeptRollouts:
    """The files of a stage's rollouts, and the plan that says with which seeds they were sampled."""

    files: RolloutFiles
    plan: StepPlan
    stage: str

    def resume(self, run: AlignmentRun) -> None:
        """Forgets the steps that the run repeats."""
        self.files.resume(run.first_step)

    def keep(
        self,
        step: int,
        rollouts: Rollouts,
        scored: ScoredRollouts,
        evaluations: ResponseEvaluations,
        experience: ExperienceSummary,
    ) -> Metrics:
        """Writes the rollouts of a step. Says once when no more are written."""
        was_full = self.files.is_full
        batch = RolloutBatch(
            step=step,
            seeds=[request.seed for request in rollout_requests(*self.plan.batch(step))],
            rollouts=rollouts,
            scored=scored,
            evaluations=evaluations,
            experience=experience,
        )
        metrics = self.files.keep(batch)
        if self.files.is_full and not was_full:
            print(
                f"{self.stage}  rollouts from step {step + 1} on are left out: those before take "
                f"{metrics['rollout/kept_mib']:.1f} of alignment.keep_rollouts_mib = "
                f"{self.plan.config.keep_rollouts_mib:g}. Raise it, or lower alignment.keep_rollouts.",
                flush=True,
            )
        return metrics


@dataclass(frozen=True, kw_only=True)
class AlignmentObserver:
    """The gold reward, the validation and the kept rollouts of a run, as far as it has them."""

    gold: GoldReward | None = None
    validation: Validation | None = None
    kept: KeptRollouts | None = None

    def resume(self, run: AlignmentRun) -> None:
        """Before the first step of an attempt."""
        if self.validation is not None:
            self.validation.resume(run)
        if self.kept is not None:
            self.kept.resume(run)

    def answers(self, run: AlignmentRun, step: int) -> Rollouts | None:
        """Held-out prompts, answered by the policy that `step` begins with; none where no validation is due."""
        return None if self.validation is None else self.validation.answers(run, step)

    def validate(self, run: AlignmentRun, step: int, answers: Rollouts | None) -> Metrics:
        """`eval/*` of the policy that `step` begins with; empty where no validation is due."""
        return {} if self.validation is None else self.validation.measure(run, step, answers)

    def measure(
        self,
        run: AlignmentRun,
        step: int,
        samples: Rollouts,
        scored: ScoredRollouts,
        evaluations: ResponseEvaluations,
        experience: ExperienceSummary,
        reward_scale: RewardScale,
    ) -> Metrics:
        """The true reward of the rollouts of a step, where it is known, and how many of them were kept."""
        metrics: Metrics = {}
        if self.gold is not None:
            metrics |= self.gold.measure(samples, scored.scores, reward_scale)
        if self.kept is not None:
            with run.changing("keep"):
                metrics |= self.kept.keep(step, samples, scored, evaluations, experience)
        return metrics

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
