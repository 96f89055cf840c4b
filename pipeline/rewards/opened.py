"""From the entries of `alignment.rewards` to sources that score: who opens what, and with which scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.rewards import THIS_RUNS_MODEL, ModelReward, RewardSourceConfig
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.evaluation.reward_scorer import RewardModelScorer
from pipeline.models.reward_model_card import read_card
from pipeline.ports import RewardScorer
from pipeline.rewards.built_in import ExactMatchReward, FormatRule, LengthRule, RegexReward
from pipeline.rewards.combined import Combination, CombinedRewards, WeightedSource
from pipeline.rewards.endpoints import Endpoint
from pipeline.rewards.function_spec import FunctionSpec, math_spec, python_spec
from pipeline.rewards.judge_reward import JudgeRewardSource
from pipeline.rewards.model_reward import ModelRewardSource, RemoteVRM, SteeredModel
from pipeline.rewards.rows import RewardSource
from pipeline.stages import storage

OWN_UNITS = RewardScale(mean=0.0, std=1.0)


@dataclass(frozen=True, kw_only=True)
class ScaledScorer:
    """A reward model that answers, with the scale of its rewards; None where nobody knows it."""

    scorer: RewardScorer
    scale: RewardScale | None

    @classmethod
    def of(cls, scorer: RewardModelScorer, weights: Mapping[str, float] | None = None) -> ScaledScorer:
        """A model in this process, whose card holds the scale. Re-weighted objectives keep it: they move it little."""
        return cls(scorer=SteeredModel(scorer, weights) if weights else scorer, scale=RewardScale.of(scorer.card))


@dataclass(frozen=True, kw_only=True)
class RewardOpeners:
    """What needs the outside world: a reward model that is served, a function in a process of its own."""

    model: Callable[[ModelReward], ScaledScorer]
    function: Callable[[FunctionSpec], RewardSource]


@dataclass(frozen=True, kw_only=True)
class OpenedSource:
    """A source that can be asked."""

    config: RewardSourceConfig
    source: RewardSource
    scale: RewardScale | None
    """Of its scores on held-out responses; None where it must be measured."""


def open_sources(
    configs: Sequence[RewardSourceConfig], openers: RewardOpeners, exits: ExitStack
) -> tuple[OpenedSource, ...]:
    """Opens every source, in the order of the recipe; what must be closed is closed by `exits`.

    Raises:
        ConfigError, DataError, WorkerError: a source cannot be opened.
    """
    return tuple(_opened(config, openers, exits) for config in configs)


def _opened(config: RewardSourceConfig, openers: RewardOpeners, exits: ExitStack) -> OpenedSource:
    written = None if config.spread is None else RewardScale(mean=0.0, std=config.spread)
    if config.model is not None and not config.model.is_url:
        scaled = openers.model(config.model)
        return OpenedSource(config=config, source=ModelRewardSource(scaled.scorer), scale=written or scaled.scale)
    if config.model is not None and config.model.form == "vrm":
        service = RemoteVRM(config.model)
        exits.callback(service.close)
        return OpenedSource(config=config, source=service, scale=written or service.scale())
    if config.model is not None:
        endpoint = Endpoint(config.model)
        exits.callback(endpoint.close)
        return OpenedSource(config=config, source=endpoint, scale=written)
    return OpenedSource(config=config, source=_without_a_model(config, openers, exits), scale=written)


def _without_a_model(config: RewardSourceConfig, openers: RewardOpeners, exits: ExitStack) -> RewardSource:
    if config.exact_match is not None:
        return ExactMatchReward(config.exact_match)
    if config.regex is not None:
        return RegexReward(config.regex)
    if config.length is not None:
        return LengthRule(config.length)
    if config.format is not None:
        return FormatRule(config.format)
    if config.math is not None:
        return openers.function(math_spec(config.name, config.math))
    if config.judge is not None:
        return JudgeRewardSource.open(config.judge, exits)
    if config.python is not None:
        return openers.function(python_spec(config.name, config.python))
    raise AssertionError(f"{config.name}: the configuration lets no other kind through")


def scale_of_checkpoint(uri: str) -> RewardScale:
    """The scale on the card of a reward model."""
    with storage.reading(uri) as directory:
        return RewardScale.of(read_card(directory))


def rewards_of_model(scaled: ScaledScorer) -> CombinedRewards:
    """A reward model alone."""
    source = WeightedSource(
        name=THIS_RUNS_MODEL.name, source=ModelRewardSource(scaled.scorer), weight=1.0, scale=scaled.scale or OWN_UNITS
    )
    return CombinedRewards([source])


def benchmark_rewards(
    sources: Sequence[OpenedSource],
    *,
    measured: Mapping[str, RewardScale],
    columns: Mapping[str, Mapping[str, Any]],
) -> CombinedRewards:
    """As `rewards_of_single_responses`, for the finished answers of a benchmark.

    Every answer counts. One without a score counts as an average answer, where the recipe would leave it out.
    """
    rewards = rewards_of_single_responses(sources, measured=measured, columns=columns)
    always = [
        replace(source, on_failure=source.scale.mean) if source.on_failure == "drop" else source
        for source in rewards.sources
    ]
    return CombinedRewards(always, "sum", columns=columns)


def rewards_of_single_responses(
    sources: Sequence[OpenedSource],
    *,
    measured: Mapping[str, RewardScale],
    columns: Mapping[str, Mapping[str, Any]],
) -> CombinedRewards:
    """The sources as a measure of responses that have no group: always their sum, without those that compare a group.

    Where the policy is trained on such sources alone, the first one that is only measured takes their place.
    """
    alone = [source for source in sources if not source.config.compares_a_group]
    if not any(source.config.weight for source in alone):
        alone[0] = replace(alone[0], config=alone[0].config.model_copy(update={"weight": 1.0}))
    return combined_rewards(alone, "sum", measured=measured, columns=columns)


def needs_measured_scales(sources: Sequence[OpenedSource], combination: Combination) -> bool:
    """Whether a sum counts a source in units that nobody knows yet. A single source keeps its own units."""
    trained = [source for source in sources if source.config.weight > 0]
    return combination == "sum" and len(trained) > 1 and any(source.scale is None for source in trained)


def combined_rewards(
    sources: Sequence[OpenedSource],
    combination: Combination,
    *,
    measured: Mapping[str, RewardScale],
    columns: Mapping[str, Mapping[str, Any]],
) -> CombinedRewards:
    """The sources together.

    Args:
        measured: scales of sources that bring none.
        columns: id of a prompt -> its other columns.
    """
    weighted = [
        WeightedSource(
            name=source.config.name,
            source=source.source,
            weight=source.config.weight,
            scale=source.scale or measured.get(source.config.name, OWN_UNITS),
            on_failure=source.config.on_failure,
        )
        for source in sources
    ]
    return CombinedRewards(weighted, combination, columns=columns)
