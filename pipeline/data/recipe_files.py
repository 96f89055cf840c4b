"""The data files that a recipe names, and a look at the first rows of each before anything expensive starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.config.data import SourceConfig
from pipeline.config.recipe import ExperimentConfig
from pipeline.data.files import Row, first_rows, require_distinct_files
from pipeline.data.labelled import labelled_response
from pipeline.data.preferences import ADAPTERS, PREFERRED, AnnotationColumns
from pipeline.data.prompts import EVALUATION_PROMPT_FIELDS, PROMPT_FIELDS, prompt_of
from pipeline.data.sources import (
    OVERALL,
    HeldoutRule,
    SourceRead,
    asks_for_scores,
    in_their_shares,
    is_of,
    read_source,
    require_known_objectives,
    require_usable_annotations,
)
from pipeline.errors import DataError

DATA_ROOT = "VRM_DATA_ROOT"
ROWS_LOOKED_AT = 16
"""Of each file: enough to see that it is read as another format than it has."""

Reader = Callable[[Iterable[Row]], object]
"""Reads rows as a run reads them; raises DataError."""


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file or directory of rows that a run reads."""

    path: str
    read: Reader

    def look_at(self) -> None:
        """Reads the first rows.

        Raises:
            DataError: the file is missing, empty or cannot be read; names file, line and field.
        """
        rows = list(first_rows(self.path, ROWS_LOOKED_AT))
        if not rows:
            raise DataError(f"{self.path} has no rows. Was the file written to its end?")
        self.read(rows)


def data_files(experiment: ExperimentConfig) -> Iterator[DataFile]:
    """Every file that a run reads. Their order counts for the identity of a stage. A hub data set is no file."""
    data = experiment.data
    read_asked = partial(_read_prompts, fields=PROMPT_FIELDS, columns=reward_columns(experiment))
    for path in data.prompts:
        yield DataFile(path=resolve(path), read=read_asked)
    for path in data.evaluation_prompts:
        yield DataFile(path=resolve(path), read=partial(_read_prompts, fields=EVALUATION_PROMPT_FIELDS))
    for path in experiment.benchmark.prompts:
        read_plainly = partial(_read_prompts, fields=PROMPT_FIELDS)
        yield DataFile(path=resolve(path), read=read_plainly if experiment.scores_by_reward_model else read_asked)
    for source in data.sources:
        if source.path is not None:
            yield pair_file(resolve(source.path), source, experiment.objectives)


def reward_columns(experiment: ExperimentConfig) -> dict[str, str]:
    """Column of the prompt files -> the first reward that reads it."""
    return {column: source.name for source in reversed(experiment.alignment.rewards) for column in source.columns}


def require_columns(columns: Mapping[str, str], values: Mapping[str, Any], *, place: str) -> None:
    """Refuses a prompt without a column that a reward reads.

    Args:
        columns: as `reward_columns`.
        values: the columns of the prompt.

    Raises:
        DataError: names the place, the column and the reward.
    """
    for column, reward in columns.items():
        if values.get(column) is None:
            there = ", ".join(sorted(name for name, value in values.items() if value is not None))
            raise DataError(
                f"{place}: no column {column!r}, which the reward {reward!r} reads (alignment.rewards). "
                f"The columns with a value are {there or 'none'}."
            )


def _labelled_files(experiment: ExperimentConfig) -> Iterator[DataFile]:
    """Read by the alignment alone: no other stage depends on them."""
    for path in experiment.alignment.direct.labelled_responses:
        yield DataFile(path=resolve(path), read=_read_labelled)


def check_data(experiment: ExperimentConfig) -> int:
    """Looks at the first rows of each file of a run; returns how many files there are.

    Reads the sources to their end where the first rows cannot tell whether they fit the recipe: an annotation column or
    an objective does not occur in them, or sources claim prompts for training and for evaluation.

    Raises:
        DataError: a file cannot be used, or the sources do not fit the recipe; names file, line and field.
    """
    files = [*data_files(experiment), *_labelled_files(experiment)]
    for file in files:
        file.look_at()
    data = experiment.data
    if all(source.hub is None for source in data.sources) and not _first_rows_tell(experiment):
        HeldoutRule.of(read_sources(experiment), data.heldout_fraction, experiment.seed)
    return len(files)


def pair_file(path: str, source: SourceConfig, objectives: Sequence[str]) -> DataFile:
    """A file of preference pairs."""
    return DataFile(path=path, read=partial(_read_pairs, source=source, objectives=tuple(objectives)))


def read_sources(experiment: ExperimentConfig) -> list[SourceRead]:
    """Reads every source of the recipe and takes its share.

    Raises:
        DataError: a source cannot be used, or an objective is annotated in none; names the place and the cure.
    """
    data, seed = experiment.data, experiment.seed
    if not data.sources:
        return []
    # One file may be two sources only where `where` tells their rows apart.
    for where in {tuple(sorted(source.where.items())) for source in data.sources}:
        same = [source for source in data.sources if tuple(sorted(source.where.items())) == where]
        require_distinct_files([resolve(source.path) for source in same if source.path is not None])
    sources = [
        read_source(
            source,
            source.hub or resolve(str(source.path)),
            experiment.objectives,
            seed=seed,
            max_left_out=data.max_left_out,
        )
        for source in data.sources
    ]
    require_known_objectives(sources, experiment.objectives)
    require_usable_annotations(sources, experiment.reward.loss.score_weight)
    return in_their_shares(sources, seed)


def _first_rows_tell(experiment: ExperimentConfig) -> bool:
    """Whether the first rows show every annotation column and objective that the recipe asks for."""
    data = experiment.data
    if {"train", "heldout"} <= {source.side for source in data.sources}:
        return False
    annotated: set[str] = set()
    columns_seen = False
    for source in data.sources:
        rows = [row for row in first_rows(resolve(str(source.path)), ROWS_LOOKED_AT) if is_of(row, source)]
        if not rows:
            return False
        columns = AnnotationColumns.of(source.name, source.objectives, experiment.objectives)
        _read_pairs(rows, source=source, objectives=experiment.objectives, columns=columns)
        asked = asks_for_scores(source, experiment.reward.loss.score_weight)
        if asked and (columns.missing() or not (columns.has_scores or PREFERRED in columns.objective_of)):
            return False
        seen = {*columns.found, PREFERRED}
        annotated.update(objective for name, objective in columns.objective_of.items() if name in seen)
        columns_seen |= source.objectives != {} and bool(columns.found.keys() - OVERALL)
    return annotated == {*experiment.objectives} or not (annotated or columns_seen)


def resolve(path: str) -> str:
    """A data path of a recipe: relative paths start at VRM_DATA_ROOT, or at the working directory without it."""
    return os.path.join(os.environ.get(DATA_ROOT, ""), path)


def _read_prompts(rows: Iterable[Row], *, fields: Sequence[str], columns: Mapping[str, str] | None = None) -> None:
    for row in rows:
        prompt_of(row, fields)
        require_columns(columns or {}, row.values, place=row.place)


def _read_labelled(rows: Iterable[Row]) -> None:
    for row in rows:
        labelled_response(row)


def _read_pairs(
    rows: Iterable[Row],
    *,
    source: SourceConfig,
    objectives: tuple[str, ...],
    columns: AnnotationColumns | None = None,
) -> None:
    columns = columns or AnnotationColumns.of(source.name, source.objectives, objectives)
    for _ in ADAPTERS[source.format]((row for row in rows if is_of(row, source)), columns, 0):
        pass
