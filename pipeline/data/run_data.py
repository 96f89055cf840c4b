"""All data of a run, from any source: pairs, prompts and texts, each split into training and held out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.config.recipe import ExperimentConfig
from pipeline.config.reward import JudgeConfig
from pipeline.data.batching import stable_seed
from pipeline.data.decontamination import Contamination, EvaluationPrompts, find_contamination
from pipeline.data.files import content_fingerprint
from pipeline.data.planted import GoldAnnotator, PlantedWorld
from pipeline.data.preferences import LeftOut, normalised_prompt, read_pairs, split_by_prompt, take_pairs
from pipeline.data.prompts import read_prompts
from pipeline.errors import ConfigError, DataError
from pipeline.records import Message, PreferencePair

NamedPrompt = tuple[str, tuple[Message, ...]]

DATA_ROOT = "VRM_DATA_ROOT"


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The splits of a run. No held-out prompt is in a training split."""

    train_pairs: Sequence[PreferencePair]
    heldout_pairs: Sequence[PreferencePair]
    train_prompts: Sequence[NamedPrompt]
    heldout_prompts: Sequence[NamedPrompt]
    sft_texts: Sequence[tuple[tuple[Message, ...], str]]
    left_out: Mapping[LeftOut, int]
    """Comparisons of the preference files that gave no pair, by reason."""
    gold: GoldAnnotator | None
    """The truth, where it is known."""
    contamination: Contamination | None
    """Overlap of all training prompts with the evaluation files, before the exact matches were left out of the
    splits; None without such files."""


def load_data(experiment: ExperimentConfig) -> RunData:
    """Reads or makes the data of a run.

    Raises:
        ConfigError: the recipe names no data.
        DataError: a file cannot be used; names file, line and field.
    """
    data = _planted(experiment) if experiment.data.source == "planted" else _from_files(experiment)
    return replace(
        data, train_pairs=with_flipped_labels(data.train_pairs, experiment.data.label_flips, experiment.seed)
    )


def with_flipped_labels(pairs: Sequence[PreferencePair], share: float, seed: int) -> list[PreferencePair]:
    """The pairs in their order, each with probability `share` with its responses and their scores swapped."""
    return [
        pair
        if stable_seed("flip", seed, pair.id) / 2**62 >= share
        else replace(
            pair,
            chosen=pair.rejected,
            rejected=pair.chosen,
            scores_chosen=pair.scores_rejected,
            scores_rejected=pair.scores_chosen,
        )
        for pair in pairs
    ]


def pairs_of_the_reward_model(data: RunData, judge: JudgeConfig | None) -> RunData:
    """The data without the training pairs that are the judge's."""
    return data if judge is None else _with_pairs_of(data, judge, judges=False)


def pairs_of_the_judge(data: RunData, judge: JudgeConfig) -> RunData:
    """The data with the judge's training pairs alone. The held-out pairs are those of the reward model."""
    return _with_pairs_of(data, judge, judges=True)


def _with_pairs_of(data: RunData, judge: JudgeConfig, *, judges: bool) -> RunData:
    """Split by prompt, so that the two models share none.

    Raises:
        DataError: nothing is left.
    """
    pairs = [
        pair
        for pair in data.train_pairs
        if (stable_seed("judge", judge.seed, normalised_prompt(pair.prompt)) / 2**62 < judge.share) == judges
    ]
    if not pairs:
        raise DataError(
            f"judge.share = {judge.share:g} of {len(data.train_pairs)} training pairs leaves the "
            f"{'judge' if judges else 'reward model'} none. Give more pairs, or another share."
        )
    return replace(data, train_pairs=pairs)


def data_fingerprints(experiment: ExperimentConfig) -> list[str]:
    """Content hashes of the files a run reads: a changed file is another input. A hub data set counts by its name."""
    data = experiment.data
    files = [*data.prompts, *_evaluation_files(experiment)]
    if data.source == "files":
        files += data.preferences
    return [content_fingerprint(resolve(file)) for file in files]


def resolve(path: str) -> str:
    """A data path of a recipe: relative paths start at VRM_DATA_ROOT, or at the working directory without it."""
    return os.path.join(os.environ.get(DATA_ROOT, ""), path)


def _evaluation_files(experiment: ExperimentConfig) -> tuple[str, ...]:
    return (*experiment.data.evaluation_prompts, *experiment.benchmark.prompts)


def _planted(experiment: ExperimentConfig) -> RunData:
    world = PlantedWorld(experiment.data.planted, experiment.objectives, experiment.seed)
    return RunData(
        train_pairs=world.train_pairs(),
        heldout_pairs=world.heldout_pairs(),
        train_prompts=[(prompt.id, prompt.messages) for prompt in world.train_prompts],
        heldout_prompts=[(prompt.id, prompt.messages) for prompt in world.heldout_prompts],
        sft_texts=world.sft_texts(),
        left_out={},
        gold=world.gold,
        contamination=None,
    )


def _from_files(experiment: ExperimentConfig) -> RunData:
    data, seed = experiment.data, experiment.seed
    if not data.preferences:
        raise ConfigError(f'data.preferences = (): data.source = "{data.source}" needs at least one data set')
    hub = data.source == "hub"
    sources = data.preferences if hub else [resolve(path) for path in data.preferences]
    read = read_pairs(
        sources,
        data.preferences_format,
        experiment.objectives,
        hub=hub,
        seed=seed,
        max_left_out=data.max_left_out,
    )
    pairs = read.pairs
    train_pairs, heldout_pairs = split_by_prompt(take_pairs(pairs, data.max_pairs, seed), data.heldout_fraction, seed)
    # Without prompt files the policy is aligned on the prompts of the pairs; either way the same rule splits them.
    prompts = (
        list(read_prompts([resolve(path) for path in data.prompts]))
        if data.prompts
        else [(pair.id, pair.prompt) for pair in pairs]
    )
    heldout_texts = {normalised_prompt(pair.prompt) for pair in heldout_pairs}
    sides: tuple[list[NamedPrompt], list[NamedPrompt]] = ([], [])
    for identity, messages in prompts:
        text = normalised_prompt(messages)
        draw = stable_seed("split", seed, text) / 2**62
        sides[text in heldout_texts or draw < data.heldout_fraction].append((identity, messages))
    if not sides[0] or not sides[1]:
        raise DataError(
            f"splitting {len(prompts)} prompts with data.heldout_fraction = {data.heldout_fraction} leaves "
            f"{len(sides[0])} for alignment and {len(sides[1])} held out. Give more prompts, or another fraction."
        )
    contamination = None
    files = [resolve(path) for path in _evaluation_files(experiment)]
    if files:
        evaluation = EvaluationPrompts(files)
        training = [*((pair.id, pair.prompt) for pair in train_pairs), *sides[0]]
        contamination = find_contamination(training, evaluation)
        train_pairs = [pair for pair in train_pairs if not evaluation.holds(pair.prompt)]
        sides[0][:] = [named for named in sides[0] if not evaluation.holds(named[1])]
        if not train_pairs or not sides[0]:
            raise DataError(
                f"every training {'prompt' if train_pairs else 'pair'} stands in an evaluation file "
                f"({', '.join(files)}) and was left out. Give other training data."
            )
    return RunData(
        train_pairs=train_pairs,
        heldout_pairs=heldout_pairs,
        train_prompts=sides[0],
        heldout_prompts=sides[1],
        sft_texts=[(pair.prompt, pair.chosen) for pair in train_pairs],
        left_out=read.left_out,
        gold=None,
        contamination=contamination,
    )
