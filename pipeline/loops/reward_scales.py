"""The units in which a sum counts its rewards: spreads that nobody knows are measured before the first update."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.alignment import AlignmentConfig
from pipeline.data.batching import stable_seed
from pipeline.data.prompts import PromptColumns
from pipeline.errors import WorkerError
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.ports import PolicyLearner, RolloutSource
from pipeline.records import Metrics, Prompt, RewardScore, SamplingParams
from pipeline.rewards.opened import OpenedSource
from pipeline.rewards.rows import RewardRows
from pipeline.stages import storage
from pipeline.stages.workspace import StageDirectory

if TYPE_CHECKING:
    from pipeline.columns import Rollouts

SCALES_FILE = "reward_scales.json"
"""In the directory of the stage: a resumed run counts in the units of the run that it continues."""
HELDOUT_RESPONSES = 128
"""Responses that a spread is measured on: its relative standard error is 1 / sqrt(2 * 128) = 6%."""
METRIC_PREFIX = "reward_scale/"


def scales_of_run(
    stage: StageDirectory,
    sources: Sequence[OpenedSource],
    sample: Callable[[], Rollouts],
    columns: Mapping[str, PromptColumns],
) -> dict[str, RewardScale]:
    """The measured scales of the sources that bring none: as the stage has kept them, or measured now and kept.

    Args:
        sample: held-out rollouts of the policy before its first update.
        columns: id of a prompt -> its other columns.

    Raises:
        WorkerError: a source scores none of them.
    """
    place = storage.join(stage.uri, SCALES_FILE)
    known = storage.read_text(place)
    if known is not None:
        return {name: RewardScale(**scale) for name, scale in json.loads(known).items()}
    rows = RewardRows.of(sample(), columns)
    scales = {s.config.name: _measured(s, rows) for s in sources if s.scale is None and s.config.weight > 0}
    for name, scale in scales.items():
        print(f"{stage.name}  {_scale_words(name, scale, len(rows))}", flush=True)
    kept = {name: {"mean": scale.mean, "std": scale.std} for name, scale in scales.items()}
    storage.write_text(place, json.dumps(kept, indent=1))
    return scales


def heldout_rollouts(
    rollouts: RolloutSource,
    learner: PolicyLearner[Any, Any],
    prompts: Sequence[Prompt],
    config: AlignmentConfig,
    *,
    seed: int,
) -> Rollouts:
    """Responses of the policy before its first update to the first held-out prompts, with seeds of their own."""
    rollouts.load_weights(learner.publish_weights(0))
    sampling = SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        max_response_tokens=config.max_response_tokens,
        samples_per_prompt=config.samples_per_prompt,
        seed=stable_seed("reward scales", seed),
    )
    return rollouts.generate(prompts[: max(1, HELDOUT_RESPONSES // config.samples_per_prompt)], sampling)


def scale_metrics(scales: Mapping[str, RewardScale]) -> Metrics:
    """`reward_scale/<source>/mean` and `/std`, which the benchmark reads from the finished stage."""
    return {
        f"{METRIC_PREFIX}{name}/{what}": value
        for name, scale in scales.items()
        for what, value in (("mean", scale.mean), ("std", scale.std))
    }


def scales_in(metrics: Metrics) -> dict[str, RewardScale]:
    """The scales that `scale_metrics` wrote."""
    names = {key.removeprefix(METRIC_PREFIX).rpartition("/")[0] for key in metrics if key.startswith(METRIC_PREFIX)}
    return {
        name: RewardScale(mean=metrics[f"{METRIC_PREFIX}{name}/mean"], std=metrics[f"{METRIC_PREFIX}{name}/std"])
        for name in sorted(names)
    }


def _measured(source: OpenedSource, rows: RewardRows) -> RewardScale:
    answers = source.source.score(rows)
    means = [answer.mean for answer in answers if isinstance(answer, RewardScore)]
    if not means:
        raise WorkerError(
            f"alignment.rewards: {source.config.name!r} scored none of {len(rows)} held-out responses: {answers[0]}. "
            f"Mend it, or write its `spread` into the recipe."
        )
    # Where all are equal the source has no unit yet; its own will do.
    return RewardScale(mean=float(np.mean(means)), std=float(np.std(means)) or 1.0)


def _scale_words(name: str, scale: RewardScale, count: int) -> str:
    return f"reward {name}: mean {scale.mean:.4g}, spread {scale.std:.4g} over {count} held-out responses"
