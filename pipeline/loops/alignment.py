"""Alignment, one screen, whatever the algorithm."""

from __future__ import annotations

from typing import Any

from pipeline.config.alignment import AlignmentConfig
from pipeline.data.prompts import PromptStream
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.learning.rewarded_rows import reward_rows
from pipeline.loops.alignment_observer import AlignmentObserver
from pipeline.loops.alignment_run import AlignmentRun
from pipeline.ports import BackgroundRolloutSource, PolicyLearner, RewardSources
from pipeline.records import Metrics
from pipeline.rollouts.prefetch import StepPlan, rollouts_by_step
from pipeline.stages.workspace import StageDirectory

NOBODY = AlignmentObserver()


def align(
    rollouts: BackgroundRolloutSource,
    rewards: RewardSources,
    learner: PolicyLearner[Any, Any],
    prompts: PromptStream,
    stage: StageDirectory,
    config: AlignmentConfig,
    *,
    reward_scale: RewardScale,
    observer: AlignmentObserver = NOBODY,
) -> Metrics:
    """Restores the last commit, then samples, scores, evaluates, updates and publishes until `num_steps`.

    collect:  consumes prompts; waits for all rollouts of the step, and for the gate of the publish before. With
              `config.prefetch` sampling started during the step before. A validation is sampled next.
    score:    consumes texts; produces one reward a rollout. A rollout whose source fails is not trained on.
    evaluate: consumes the rollouts as tokens; policy and reference logprobs and values stay with the learner.
    build:    consumes rewards and evaluations; the experience stays with the learner, too.
    update:   consumes the experience; produces policy `step + 1`.
    publish:  consumes that policy; waits until every engine passed the numerics gate with it.
    log:      consumes the metrics of all of these; then the step is committed, where a commit is due.

    The observer measures true rewards, keeps rollouts on disk, and validates. Nothing is trained on that.

    Args:
        reward_scale: units of the combined reward.

    Returns:
        The metrics of the last step, or of the step that `keep_best` prefers. After a KL stop, of the last good commit.

    Raises:
        NumericsError: the KL stop rule applies, and there is no earlier commit to end with.
        Preempted: the process is about to be ended. A step past its evaluation is committed, else the step before.
    """
    run = AlignmentRun(learner, stage, config)
    observer.resume(run)
    batches = rollouts_by_step(rollouts, StepPlan(prompts=prompts, config=config))
    # Publish before the first batch: rollouts must start from the restored policy.
    rollouts.load_weights(learner.publish_weights(run.first_step))
    with stage.metrics_log(config.num_steps, run.first_step) as log:
        for step in run.steps():
            with run.given_up_if_preempted(step):
                with run.waiting("rollout"):
                    samples, staleness = batches.collect(step)
                heldout_answers = observer.answers(run, step)
                batches.sample_ahead(step + 1)
                rollouts.sleep()
                with run.reading("score"):
                    scored = rewards.score(samples)
                with run.reading("evaluate"):
                    evaluated, responses = learner.evaluate(samples)
                validated = observer.validate(run, step, heldout_answers)
            rewarded, measured = reward_rows(samples, scored.scores, config, reward_scale)
            experience, built = learner.build_experience(evaluated, rewarded, kl_coefficient=run.kl_coefficient)
            measured |= built.metrics | scored.metrics
            measured |= observer.measure(run, step, samples, scored, responses, built, reward_scale)
            if run.is_past_kl_limit(measured):
                # Before the update and its commit: a resumed run must come to the same decision.
                log.write(step, staleness | measured | validated)
                run.return_to_last_good(step, measured)
                break
            with run.changing("update"):
                updated = learner.update(experience, step)
            with run.changing("weights"):
                gate = rollouts.load_weights(learner.publish_weights(step + 1))
            metrics = run.complete_step(staleness | measured | updated | gate, samples, validated)
            log.write(step, metrics | validated)
            run.commit_if_due(step)
        observer.validate_finished(run, rollouts, log)
    return run.export_result()
