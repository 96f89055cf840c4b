"""All data of a run, from any source: pairs, prompts and texts, each split into training and held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.config.recipe import ExperimentConfig
from pipeline.config.reward import JudgeConfig
from pipeline.data.batching import stable_seed
from pipeline.data.decontamination import Contamination, EvaluationPrompts, find_contamination
from pipeline.data.files import content_fingerprint
from pipeline.data.planted import GoldAnnotator, PlantedWorld
from pipeline.data.preferences import LeftOut, first_of_each_prompt, normalised_prompt, take_pairs
from pipeline.data.prompts import PromptColumns, read_prompts_with_columns
from pipeline.data.recipe_files import data_files, read_sources, resolve
from pipeline.data.sources import HeldoutRule, SourceRead
from pipeline.errors import DataError
from pipeline.records import Message, PreferencePair

NamedPrompt = tuple[str, tuple[Message, ...]]

FROM_PROMPT_FILES = "prompts"
"""How counts call the files of `data.prompts`, among the names of the sources."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The splits of a run. No held-out prompt is in a training split."""

    train_pairs: Sequence[PreferencePair]
    heldout_pairs: Sequence[PreferencePair]
    train_prompts: Sequence[NamedPrompt]
    heldout_prompts: Sequence[NamedPrompt]
    prompt_columns: Mapping[str, PromptColumns]
    """Id of a prompt -> the other columns of its row; empty without prompt files. They stay with the driver."""
    sft_texts: Sequence[tuple[tuple[Message, ...], str]]
    left_out: Mapping[str, Mapping[LeftOut, int]]
    """Comparisons that gave no pair, by source and reason."""
    source_notes: Sequence[str]
    """A sentence or two about every source: how much of it is used, and what was left out."""
    gold: GoldAnnotator | None
    """The truth, where it is known."""
    contamination: Contamination | None
    """Overlap of all training prompts with the evaluation files, before the exact matches were left out of the
    splits; None without such files."""


def load_data(experiment: ExperimentConfig) -> RunData:
    """Reads or makes the data of a run.

    Raises:
        DataError: a file cannot be used; names file, line and field.
    """
    data = _planted(experiment) if experiment.data.is_planted else _from_sources(experiment)
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
    return [content_fingerprint(file.path) for file in data_files(experiment)]


def _evaluation_files(experiment: ExperimentConfig) -> tuple[str, ...]:
    return (*experiment.data.evaluation_prompts, *experiment.benchmark.prompts)


def _planted(experiment: ExperimentConfig) -> RunData:
    world = PlantedWorld(experiment.data.planted, experiment.objectives, experiment.seed)
    return RunData(
        train_pairs=world.train_pairs(),
        heldout_pairs=world.heldout_pairs(),
        train_prompts=[(prompt.id, prompt.messages) for prompt in world.train_prompts],
        heldout_prompts=[(prompt.id, prompt.messages) for prompt in world.heldout_prompts],
        prompt_columns={},
        sft_texts=world.sft_texts(),
        left_out={},
        source_notes=(),
        gold=world.gold,
        contamination=None,
    )


def _from_sources(experiment: ExperimentConfig) -> RunData:
    data, seed = experiment.data, experiment.seed
    sources = read_sources(experiment)
    rule = HeldoutRule.of(sources, data.heldout_fraction, seed)
    train_pairs, heldout_pairs = rule.split(_used_pairs(sources, data.max_pairs, seed)) if sources else ([], [])
    # Without prompt files the policy is aligned on the prompts of the pairs; either way the same rule splits them.
    columns: dict[str, PromptColumns] = {}
    if data.prompts:
        prompts = []
        for identity, messages, others in read_prompts_with_columns([resolve(path) for path in data.prompts]):
            prompts.append((FROM_PROMPT_FILES, identity, messages))
            columns[identity] = others
    else:
        # Some publishers compare many responses to one prompt: it is asked once all the same.
        pairs = first_of_each_prompt(_used_pairs(sources, None, seed))
        prompts = [(pair.source, pair.id, pair.prompt) for pair in pairs]
    sides: tuple[list[tuple[str, str, tuple[Message, ...]]], ...] = ([], [])
    for prompt in prompts:
        sides[rule.holds_out(prompt[2])].append(prompt)
    if not sides[0] or not sides[1]:
        raise DataError(
            f"splitting {len(prompts)} prompts with data.heldout_fraction = {data.heldout_fraction} leaves "
            f"{len(sides[0])} for alignment and {len(sides[1])} held out. Give more prompts, or another fraction."
        )
    contamination = None
    files = [resolve(path) for path in _evaluation_files(experiment)]
    if files:
        evaluation = EvaluationPrompts(files)
        training = [*((pair.source, pair.id, pair.prompt) for pair in train_pairs), *sides[0]]
        contamination = find_contamination(training, evaluation)
        train_pairs = [pair for pair in train_pairs if not evaluation.holds(pair.prompt)]
        sides[0][:] = [prompt for prompt in sides[0] if not evaluation.holds(prompt[2])]
        if (sources and not train_pairs) or not sides[0]:
            raise DataError(
                f"every training {'pair' if sources and not train_pairs else 'prompt'} stands in an evaluation file "
                f"({', '.join(files)}) and was left out. Give other training data."
            )
    return RunData(
        train_pairs=train_pairs,
        heldout_pairs=heldout_pairs,
        train_prompts=[(identity, messages) for _, identity, messages in sides[0]],
        heldout_prompts=[(identity, messages) for _, identity, messages in sides[1]],
        prompt_columns=columns,
        sft_texts=[(pair.prompt, pair.chosen) for pair in train_pairs],
        left_out={source.name: source.left_out for source in sources},
        source_notes=[*(source.note() for source in sources), *rule.moved(sources)],
        gold=None,
        contamination=contamination,
    )


def _used_pairs(sources: Sequence[SourceRead], max_pairs: int | None, seed: int) -> list[PreferencePair]:
    """The pairs of all sources. `max_pairs` limits what is trained on: it leaves held-out sources whole."""
    several = len(sources) > 1
    trained, heldout = (
        [
            replace(pair, id=f"{source.name}/{pair.id}") if several else pair
            for source in sources
            if (source.config.side == "heldout") == is_heldout
            for pair in source.pairs
        ]
        for is_heldout in (False, True)
    )
    return [*(trained if max_pairs is None else take_pairs(trained, max_pairs, seed, salt="mixture")), *heldout]
