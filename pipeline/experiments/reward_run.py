"""One run of an experiment: train a reward model in this process, and measure what its head says of held-out pairs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.data.planted import GoldAnnotator
from pipeline.data.preferences import normalised_prompt
from pipeline.learning.reward_data import RewardData
from pipeline.learning.reward_trainer import RewardTrainer
from pipeline.loops.reward import RewardTraining
from pipeline.models.reward_heads import EnsembleHead, RewardOutput
from pipeline.records import Metrics
from pipeline.stages.workspace import StageDirectory

LCB = 1.0
"""c of mean - c * sd."""

REWARD_CURVES = ("train/accuracy", "eval/accuracy", "train/supervision", "eval/supervision", "eval/nll")


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run leaves behind: plain data, to be written as JSON."""

    metrics: Metrics
    """Held-out metrics of the finished model, under the names of the trainer."""
    curve: Sequence[Metrics]
    """Every step that was evaluated on held-out pairs: `step`, and those of `REWARD_CURVES` that were measured."""
    prompts: Sequence[str]
    """[B] of the held-out pairs; rows of one prompt are not independent."""
    margins: Mapping[str, Sequence[float]]
    """Reading of the reward -> [B] r_chosen - r_rejected. Always "mean"; "lcb" (mean - sd) where the head has a
    standard deviation; "min" of the members of an ensemble."""
    seconds: float
    """Training and measuring, without reading the data."""


def train_and_measure(
    training: RewardTraining, trainer: RewardTrainer, gold: GoldAnnotator | None, directory: str
) -> RunResult:
    """Trains as the pipeline's stage does, from the first step to the last.

    Args:
        trainer: of `training.spec`, in this process.
        gold: adds `weight_correlation`, where the truth is known and the head has weights.
        directory: for the stage's metrics and the exported model.
    """
    started = time.monotonic()
    data, heldout = training.data, training.data.heldout
    stage = StageDirectory(directory, "experiment", "", keep_best=training.spec.config.keep_best)
    metrics = training.run(trainer, stage)
    output = trainer.score(heldout)
    margins = {"mean": _margins(output.mean)}
    if bool(output.variance.any()):
        margins["lcb"] = _margins(output.mean - LCB * output.variance.sqrt())
    head = trainer.engine.module.head
    if isinstance(head, EnsembleHead):
        margins["min"] = _margins(_read_as_minimum(trainer, head, data).mean)
    return RunResult(
        metrics=trainer.training | metrics | _agreement_with_planted_weights(output, data, gold),
        curve=_curve(stage.metrics_rows()),
        prompts=[normalised_prompt(p.pair.prompt) for p in data.heldout_pairs],
        margins=margins,
        seconds=time.monotonic() - started,
    )


def _agreement_with_planted_weights(output: RewardOutput, data: RewardData, gold: GoldAnnotator | None) -> Metrics:
    """`weight_correlation` on the held-out pairs; nothing where one side has no weights."""
    weights = output.weights[: len(data.heldout_pairs)].double().numpy()
    if gold is None or not weights.shape[1]:
        return {}
    planted = [
        [gold.objective_weights(p.pair.prompt)[name] for name in data.statistics.objectives] for p in data.heldout_pairs
    ]
    return {"weight_correlation": weight_correlation(weights, np.array(planted))}


def weight_correlation(inferred: np.ndarray, planted: np.ndarray) -> float:
    """Pearson correlation over (prompt, objective) of inferred and planted objective weights; 0 without variation.

    Args:
        inferred, planted: [B, K].
    """
    x, y = (w.ravel() - w.mean() for w in (inferred, planted))
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norm if norm > 1e-12 else 0.0


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
    """One point an evaluation: the last step is logged twice, as the update and as the final evaluation."""
    points: dict[int, Metrics] = {}
    for row in rows:
        point = points.setdefault(int(row["step"]), {"step": float(row["step"] + 1)})
        point |= {name: row[name] for name in REWARD_CURVES if name in row}
    return [point for point in points.values() if "eval/accuracy" in point]
