"""Training on a fixed data set: the policy's fine-tuning and the reward model use the same loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from pipeline.ports import Learner
from pipeline.records import DirectBatch, Metrics, PreferenceBatch
from pipeline.stages.metrics_log import StepWork
from pipeline.stages.workspace import StageDirectory

TrainingBatch = TypeVar("TrainingBatch")


def train(
    learner: Learner[TrainingBatch],
    stage: StageDirectory,
    *,
    batch_of: Callable[[int], TrainingBatch],
    heldout: TrainingBatch,
    num_steps: int,
    eval_every: int,
    checkpoint_every: int,
    evaluate_finished: Callable[[], Metrics] | None = None,
) -> Metrics:
    """As `fit`, then exports the model to the stage's result."""
    final = fit(
        learner,
        stage,
        batch_of=batch_of,
        heldout=heldout,
        num_steps=num_steps,
        eval_every=eval_every,
        checkpoint_every=checkpoint_every,
        evaluate_finished=evaluate_finished,
    )
    learner.export(stage.result_uri)
    return final


def fit(
    learner: Learner[TrainingBatch],
    stage: StageDirectory,
    *,
    batch_of: Callable[[int], TrainingBatch],
    heldout: TrainingBatch,
    num_steps: int,
    eval_every: int,
    checkpoint_every: int,
    evaluate_finished: Callable[[], Metrics] | None = None,
) -> Metrics:
    """Restores the last commit, trains to `num_steps` and evaluates once more.

    Consumes batches `batch_of(step)`, a pure function, so a resumed run sees the same data. The commit of step s holds
    the state after step s; a run killed anywhere resumes after its last commit and ends with the same weights.

    Args:
        evaluate_finished: measures the finished model, and may complete it; None evaluates it on `heldout`.

    Returns:
        The held-out metrics of the finished model: the last, or the one that `keep_best` prefers.

    Raises:
        Preempted: the process is about to be ended; the step it was in is committed.
    """
    evaluate_finished = evaluate_finished or partial(learner.evaluate, heldout)
    checkpoint = stage.checkpoints.latest()
    if checkpoint is not None:
        learner.restore(checkpoint.uri)
    first_step = 0 if checkpoint is None else checkpoint.step + 1
    with stage.metrics_log(num_steps, first_step) as log:
        for step in range(first_step, num_steps):
            stage.checkpoints.require_sound()
            batch = batch_of(step)
            metrics = learner.update(batch, step)
            if (step + 1) % eval_every == 0 and step + 1 < num_steps:
                metrics |= learner.evaluate(heldout)
            log.write(step, metrics, work_of(batch))
            if step + 1 < num_steps and stage.is_commit_due(step, every=checkpoint_every):
                stage.checkpoints.save(step, learner.snapshot, state={"metrics": metrics})
                stage.leave_if_preempted(step)
        final = evaluate_finished()
        log.write(num_steps - 1, final)
    best = stage.checkpoints.better_than(final)
    if best is not None:
        learner.restore(best.uri)
        final = evaluate_finished()
    return final


def work_of(batch: object) -> StepWork:
    """What a batch counts as in the rate on the console; a batch of an unknown kind counts as a step."""
    match batch:
        case PreferenceBatch():
            return StepWork(count=batch.num_pairs, unit="pairs")
        case DirectBatch():
            paired = batch.num_responses == 2 * batch.num_rows
            return StepWork(count=batch.num_rows, unit="pairs" if paired else "responses")
        case list():
            return StepWork(count=len(batch), unit="texts")
        case _:
            return StepWork(count=1, unit="steps")
