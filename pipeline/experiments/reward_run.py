"""One run of an experiment: trains a reward model in this process, and measures it on held-out pairs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pipeline.data.preferences import normalised_prompt
from pipeline.learning.reward_data import RewardData
from pipeline.learning.reward_trainer import RewardTrainer
from pipeline.loops.reward import RewardTraining
from pipeline.models.reward_heads import EnsembleHead, RewardOutput
from pipeline.records import Metrics
from pipeline.stages.workspace import StageDirectory

LCB_COEFFICIENT = 1.0
"""c of mean - c * sd."""

REWARD_CURVE_METRICS = ("train/accuracy", "eval/accuracy", "train/supervision", "eval/supervision", "eval/nll")


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of a run, as plain data for a JSON file."""

    metrics: Metrics
    """Held-out metrics of the finished model, under the names of the trainer."""
    curve: Sequence[Metrics]
    """One point per held-out evaluation: `step`, and the measured ones of `REWARD_CURVE_METRICS`."""
    prompts: Sequence[str]
    """[B] prompt of each held-out pair. Pairs of the same prompt are not independent."""
    margins: Mapping[str, Sequence[float]]
    """Reading of the reward -> [B] r_chosen - r_rejected. "mean" is always there; "lcb" (mean - sd) if the head has a
    standard deviation; "min" over the members if it is an ensemble."""
    seconds: float
    """Time of training and measuring, without reading the data."""


def train_and_measure(training: RewardTraining, trainer: RewardTrainer, directory: str) -> RunResult:
    """Trains as the pipeline's stage does, from the first step to the last.

    Args:
        trainer: the trainer of `training.spec`, in this process.
        directory: where the stage writes its metrics and the exported model.
    """
    started = time.monotonic()
    data, heldout = training.data, training.data.heldout
    stage = StageDirectory(directory, "experiment", "", keep_best=training.spec.config.keep_best)
    metrics = training.run(trainer, stage)
    output = trainer.score(heldout)
    margins = {"mean": _margins(output.mean)}
    stds = output.deviations.norm(dim=-1)
    if bool(stds.any()):
        margins["lcb"] = _margins(output.mean - LCB_COEFFICIENT * stds)
    head = trainer.engine.module.head
    if isinstance(head, EnsembleHead):
        margins["min"] = _margins(_read_as_minimum(trainer, head, data).mean)
    return RunResult(
        metrics=trainer.training | metrics,
        curve=_curve(stage.metrics_rows()),
        prompts=[normalised_prompt(p.pair.prompt) for p in data.heldout_pairs],
        margins=margins,
        seconds=time.monotonic() - started,
    )


def _read_as_minimum(trainer: RewardTrainer, head: EnsembleHead, data: RewardData) -> RewardOutput:
    reward, head.reward = head.reward, "min"
    try:
        return trainer.score(data.heldout)
    finally:
        head.reward = reward


def _margins(rewards: torch.Tensor) -> list[float]:
    chosen, rejected = rewards.double().chunk(2)
    return (chosen - rejected).tolist()


def _curve(rows: Sequence[Mapping[str, float]]) -> list[Metrics]:
    """One point per evaluation. The last step is logged twice, as an update and as the final evaluation."""
    points: dict[int, Metrics] = {}
    for row in rows:
        point = points.setdefault(int(row["step"]), {"step": float(row["step"] + 1)})
        point |= {name: row[name] for name in REWARD_CURVE_METRICS if name in row}
    return [point for point in points.values() if "eval/accuracy" in point]
