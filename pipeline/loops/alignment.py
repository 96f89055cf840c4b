"""Alignment, one screen, whatever the algorithm."""

from __future__ import annotations

import time

from pipeline.config.alignment import AlignmentConfig
from pipeline.data.prompts import PromptStream
from pipeline.errors import NumericsError
from pipeline.evaluation.overoptimization import GoldReward
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.learning.experience import build_experience
from pipeline.objectives.divergence import adapt_kl_coefficient
from pipeline.ports import BackgroundRolloutSource, PolicyLearner, RewardScorer
from pipeline.records import Metrics
from pipeline.rollouts.prefetch import StepPlan, rollouts_by_step
from pipeline.stages.workspace import StageDirectory


def align(
    rollouts: BackgroundRolloutSource,
    scorer: RewardScorer,
    learner: PolicyLearner,
    prompts: PromptStream,
    stage: StageDirectory,
    config: AlignmentConfig,
    *,
    reward_scale: RewardScale,
    seed: int,
    gold: GoldReward | None = None,
) -> Metrics:
    """Restores the last commit, then: sample, score, evaluate, update, publish, until `num_steps`.

    Consumes `prompts.batch(step)`. Waits for every rollout of a step before its update; with `config.prefetch` they
    were begun during the update before, else nothing overlaps. The rollout engines hold the learner's weights, proven
    by the gate, before any of their samples is used. With `gold` every step also says what the truth thinks of its
    rollouts; nothing is trained on that.

    Returns:
        The metrics of the last step, or of the step that `keep_best` prefers; of the last good commit when the KL stop
        rule ended the run.

    Raises:
        NumericsError: the KL stop rule applies, and there is no earlier commit to end with.
        Preempted: the process is about to be ended; the step it was in is committed, or the one before where it had
            not come to its update.
    """
    batches = rollouts_by_step(rollouts, StepPlan(prompts=prompts, config=config, seed=seed))
    checkpoint = stage.checkpoints.latest()
    if checkpoint is not None:
        learner.restore(checkpoint.uri)
    first_step = 0 if checkpoint is None else checkpoint.step + 1
    kl_coefficient = config.kl.coefficient if checkpoint is None else checkpoint.state["kl_coefficient"]
    metrics: Metrics = {} if checkpoint is None else checkpoint.state["metrics"]

    def save(step: int) -> None:
        stage.checkpoints.save(step, learner.snapshot, state={"kl_coefficient": kl_coefficient, "metrics": metrics})

    # Publish before the first batch: rollouts must start from the restored policy.
    gate = rollouts.load_weights(learner.publish_weights(first_step))
    with stage.metrics_log(config.num_steps, first_step) as log:
        clock = Stopwatch()
        for step in range(first_step, config.num_steps):
            stage.checkpoints.require_sound()
            with stage.given_up_if_preempted(step, save):
                with stage.cut_short_if_preempted():
                    samples, ages = batches.collect(step)
                clock.lap("rollout")
                rollouts.sleep()
                asked, said = [s.prompt.messages for s in samples], [s.response_text for s in samples]
                scores = scorer.score(asked, said)
                clock.lap("score")
                stage.give_up_if_preempted()
                evaluations = learner.evaluate(samples)
                clock.lap("evaluate")
            experience, measured = build_experience(
                samples,
                scores,
                evaluations,
                ppo=config.ppo,
                kl=config.kl,
                kl_coefficient=kl_coefficient,
                reward_scale=reward_scale,
                max_response_tokens=config.max_response_tokens,
            )
            if gold is not None:
                measured |= gold.measure(asked, said, [score.mean for score in scores], reward_scale)
            kl = measured["kl/per_response"]
            if config.kl.stop_above is not None and kl > config.kl.stop_above:
                # Before the update and its commit: a resumed run must come to the same decision.
                log.write(step, ages | measured)
                metrics = return_to_last_good(learner, stage, step, kl=kl, limit=config.kl.stop_above)
                break
            updated = learner.update(experience, step)
            clock.lap("update")
            if config.kl.target is not None:
                kl_coefficient = adapt_kl_coefficient(
                    kl_coefficient,
                    kl=kl,
                    target=config.kl.target,
                    horizon=config.kl.horizon,
                    num_responses=len(samples),
                )
            gate = rollouts.load_weights(learner.publish_weights(step + 1))
            clock.lap("weights")
            metrics = ages | measured | updated | gate | clock.metrics(sum(len(s.response_ids) for s in samples))
            log.write(step, metrics)
            # Begins before the save, which the next row tells of: no commit may come before the row of its own step.
            clock = Stopwatch()
            last = step + 1 == config.num_steps
            if not last and stage.is_commit_due(step, every=config.checkpoint_every):
                save(step)
                stage.leave_if_preempted(step)
                clock.lap("save")
        else:
            # Not after the KL stop: no policy has a better reward than the one that went too far for it.
            best = stage.checkpoints.better_than(metrics)
            if best is not None:
                learner.restore(best.uri)
                metrics = best.state["metrics"]
    learner.export(stage.result_uri)
    return metrics


def return_to_last_good(
    learner: PolicyLearner, stage: StageDirectory, step: int, *, kl: float, limit: float
) -> Metrics:
    """Restores the newest committed policy that was measured and stayed below the KL limit; returns its metrics.

    The policy that entered `step` is the one that went too far, and a commit of `step - 1` holds that very policy.
    """
    good = stage.checkpoints.latest(before=step - 1)
    if good is None:
        raise NumericsError(
            f"KL to the reference is {kl:.3g} nats per response at step {step}, above alignment.kl.stop_above = "
            f"{limit:g}, and no checkpoint from before is left to end with. Raise alignment.kl.coefficient, lower "
            "alignment.ppo.policy.learning_rate, or keep more checkpoints (alignment.keep_checkpoints of at least 2)."
        )
    learner.restore(good.uri)
    return good.state["metrics"] | {"kl/stopped_at_step": float(step), "kl/at_stop": kl}


class Stopwatch:
    """Seconds per phase of a step; the first is the save behind the step before, where there was one."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self._laps: Metrics = {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self._laps[f"seconds/{phase}"] = now - self._last
        self._last = now

    def metrics(self, num_tokens: int) -> Metrics:
        """Seconds of each phase, and response tokens per second of the rollout and of the whole step.

        The rollout's are those that the learner waited for: with prefetch, most of its sampling is not among them.
        """
        return self._laps | {
            "tokens_per_s/rollout": num_tokens / self._laps["seconds/rollout"],
            "tokens_per_s/step": num_tokens / (self._last - self._started),
        }
