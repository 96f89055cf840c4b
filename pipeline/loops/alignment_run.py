"""What an alignment keeps from step to step: its commits, its clock, its KL coefficient, its last metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from pipeline.columns import Rollouts
from pipeline.config.alignment import AlignmentConfig, KLConfig
from pipeline.errors import NumericsError
from pipeline.evaluation.policy_drift import PolicyAlarms
from pipeline.learning.validation_metrics import UPDATES
from pipeline.objectives.divergence import adapt_kl_coefficient
from pipeline.ports import PolicyLearner
from pipeline.records import Metrics
from pipeline.rollouts.prefetch import remark_on_prefetch
from pipeline.stages.workspace import StageDirectory


class AlignmentRun:
    """One run of `align`, which is the algorithm alone. What may interrupt, time or end a step is here.

    A run resumes after its last commit. A commit holds the learner, the KL coefficient and the last metrics.
    """

    def __init__(self, learner: PolicyLearner[Any, Any], stage: StageDirectory, config: AlignmentConfig) -> None:
        """Restores the learner from the last commit, where there is one."""
        self._learner = learner
        self._stage = stage
        self._config = config
        self._clock = Stopwatch()
        self.ended_by_kl = False
        self._prefetch_is_measured = False
        checkpoint = stage.checkpoints.latest()
        if checkpoint is not None:
            learner.restore(checkpoint.uri)
        self.first_step = 0 if checkpoint is None else checkpoint.step + 1
        self.kl_coefficient: float = config.kl.coefficient if checkpoint is None else checkpoint.state["kl_coefficient"]
        self.metrics: Metrics = {} if checkpoint is None else checkpoint.state["metrics"]
        """Of the last completed step; with `eval/*` where the policy after it was validated."""
        self._alarms = PolicyAlarms(
            [row for row in stage.metrics_rows() if row["step"] < self.first_step],
            say=lambda message: print(f"{stage.name:<19} {message}", flush=True),
        )

    @property
    def num_steps(self) -> int:
        return self._config.num_steps

    def steps(self) -> Iterator[int]:
        """The steps that are left to do."""
        self._clock.restart()
        for step in range(self.first_step, self._config.num_steps):
            self._stage.checkpoints.require_sound()
            yield step

    # ------------------------------------------------------------------ preemption and time

    def given_up_if_preempted(self, step: int) -> AbstractContextManager[None]:
        """Around the part of a step that only reads the learner. A preemption notice within it ends the step there.

        Raises:
            Preempted: the notice was given; the step before is committed.
        """
        return self._stage.given_up_if_preempted(step, self._save)

    @contextmanager
    def waiting(self, phase: str) -> Iterator[None]:
        """Times a wait, which ends with the preemption notice; within `given_up_if_preempted`."""
        with self._stage.cut_short_if_preempted():
            yield
        self._clock.lap(phase)

    @contextmanager
    def reading(self, phase: str) -> Iterator[None]:
        """Times a call that reads the learner or the samples. After the notice the call is not made."""
        self._stage.give_up_if_preempted()
        yield
        self._clock.lap(phase)

    @contextmanager
    def changing(self, phase: str) -> Iterator[None]:
        """Times a call that changes the learner or the engines. The notice does not stop it."""
        yield
        self._clock.lap(phase)

    # ------------------------------------------------------------------ validation

    def known_validation(self, updates: int) -> Metrics:
        """`eval/*` of the policy after so many updates, if that is the current one and was validated; else empty."""
        return {
            name: value
            for name, value in self.metrics.items()
            if name.startswith("eval/") and self.metrics.get(UPDATES) == updates
        }

    def take_validation(self, updates: int, validated: Metrics) -> None:
        """Notes what a validation measured of the current policy, before an update changes it.

        The commit that holds the policy learns it, so that a resumed run does not validate it again. Without such a
        commit the policy is saved now, if it is the best so far and `keep_best` asks for that. The policy before the
        first update is never the best: nothing holds it.
        """
        self.metrics = self.metrics | validated
        checkpoints = self._stage.checkpoints
        if updates == 0 or checkpoints.amend(updates - 1, self._state()):
            return
        is_asked_for = self._config.keep_best == "eval/reward" and updates < self.num_steps
        if is_asked_for and checkpoints.better_than(self.metrics) is None:
            self._save(updates - 1)

    # ------------------------------------------------------------------ end of a step

    def complete_step(self, metrics: Metrics, samples: Rollouts, validated: Metrics) -> Metrics:
        """Adapts the KL coefficient for the next step. Returns the metrics of this one, with its times and alarms.

        Args:
            validated: `eval/*` of the policy that sampled, where it was validated.
        """
        self.kl_coefficient = next_kl_coefficient(
            self.kl_coefficient, self._config.kl, measured=metrics["kl/per_response"], num_responses=len(samples)
        )
        metrics |= self._clock.metrics(samples.num_response_tokens)
        # `validated` is of the policy that sampled, the commit of the step holds the policy after it.
        self.metrics = metrics | self._alarms.check(metrics | validated)
        if not self._prefetch_is_measured and "rollout/seconds" in self.metrics:
            self._prefetch_is_measured = True
            if remark := remark_on_prefetch(self.metrics):
                print(f"{self._stage.name}  {remark}", flush=True)
        return self.metrics

    def commit_if_due(self, step: int) -> None:
        """Saves the state after a step whose row is written: no commit may come before the row of its own step.

        Raises:
            Preempted: the process is about to be ended, and the step is committed.
        """
        # The row of this step is written, so the next row reports how long this save took.
        self._clock.restart()
        is_last = step + 1 == self._config.num_steps
        if not is_last and self._stage.is_commit_due(step, every=self._config.checkpoint_every):
            self._save(step)
            self._stage.leave_if_preempted(step)
            self._clock.lap("save")

    def _save(self, step: int) -> None:
        self._stage.checkpoints.save(step, self._learner.snapshot, state=self._state())

    def _state(self) -> dict[str, Any]:
        return {"kl_coefficient": self.kl_coefficient, "metrics": self.metrics}

    # ------------------------------------------------------------------ end of the run

    def is_past_kl_limit(self, measured: Metrics) -> bool:
        """The policy of this step is farther from its reference than `kl.stop_above`."""
        limit = self._config.kl.stop_above
        return limit is not None and measured["kl/per_response"] > limit

    def return_to_last_good(self, step: int, measured: Metrics) -> None:
        """Restores the newest committed policy that was measured and stayed below the KL limit.

        The policy that entered `step` went too far. A commit of `step - 1` holds that same policy.

        Raises:
            NumericsError: there is no earlier commit.
        """
        kl = measured["kl/per_response"]
        good = self._stage.checkpoints.latest(before=step - 1)
        if good is None:
            raise NumericsError(
                f"KL to the reference is {kl:.3g} nats per response at step {step}, above alignment.kl.stop_above = "
                f"{self._config.kl.stop_above:g}, and no earlier checkpoint is left to end with. Raise "
                "alignment.kl.coefficient, lower alignment.ppo.policy.learning_rate, or keep more checkpoints "
                "(alignment.keep_checkpoints of at least 2)."
            )
        self._learner.restore(good.uri)
        self.metrics = good.state["metrics"] | {"kl/stopped_at_step": float(step), "kl/at_stop": kl}
        self.ended_by_kl = True

    def export_result(self) -> Metrics:
        """Exports the last policy, or the committed one that `keep_best` prefers. Returns the metrics of its step."""
        # Not after the KL stop: the policy that went too far has the best reward.
        best = None if self.ended_by_kl else self._stage.checkpoints.better_than(self.metrics)
        if best is not None:
            self._learner.restore(best.uri)
            self.metrics = best.state["metrics"]
        self._learner.export(self._stage.result_uri)
        return self.metrics


def next_kl_coefficient(coefficient: float, kl: KLConfig, *, measured: float, num_responses: int) -> float:
    """The weight of the KL in the next step: fixed, or moved towards the recipe's target.

    Args:
        measured: mean KL per response in this step, nats.
        num_responses: responses of this step.
    """
    if kl.target is None:
        return coefficient
    return adapt_kl_coefficient(
        coefficient, kl=measured, target=kl.target, horizon=kl.horizon, num_responses=num_responses
    )


class Stopwatch:
    """Seconds per phase of a step. The first phase is the save after the step before, where there was one."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Starts a new step."""
        self._started = self._last = time.perf_counter()
        self._laps: Metrics = {}

    def lap(self, phase: str) -> None:
        """Ends a phase, which began when the phase before ended."""
        now = time.perf_counter()
        # A validation waits for the engines, and later for scorer and learner.
        self._laps[f"seconds/{phase}"] = self._laps.get(f"seconds/{phase}", 0.0) + now - self._last
        self._last = now

    def metrics(self, num_tokens: int) -> Metrics:
        """Seconds of each phase, and response tokens per second of the rollout and of the whole step.

        The seconds of the rollout are those that the learner waited. With prefetch most of the sampling is not in them.
        """
        return self._laps | {
            "tokens_per_s/rollout": num_tokens / self._laps["seconds/rollout"],
            "tokens_per_s/step": num_tokens / (self._last - self._started),
        }
