"""The data files that a recipe names, and a look at the first rows of each before anything expensive starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from pipeline.config.data import DataConfig
from pipeline.config.recipe import ExperimentConfig
from pipeline.data.files import Row, first_rows
from pipeline.data.labelled import labelled_response
from pipeline.data.preferences import ADAPTERS
from pipeline.data.prompts import EVALUATION_PROMPT_FIELDS, PROMPT_FIELDS, prompt_of
from pipeline.errors import ConfigError, DataError

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
    for path in data.prompts:
        yield DataFile(path=resolve(path), read=partial(_read_prompts, fields=PROMPT_FIELDS))
    for path in data.evaluation_prompts:
        yield DataFile(path=resolve(path), read=partial(_read_prompts, fields=EVALUATION_PROMPT_FIELDS))
    for path in experiment.benchmark.prompts:
        yield DataFile(path=resolve(path), read=partial(_read_prompts, fields=PROMPT_FIELDS))
    if data.source == "files":
        for path in data.preferences:
            yield pair_file(resolve(path), data.preferences_format, experiment.objectives)


def _labelled_files(experiment: ExperimentConfig) -> Iterator[DataFile]:
    """Read by the alignment alone: no other stage depends on them."""
    for path in experiment.alignment.direct.labelled_responses:
        yield DataFile(path=resolve(path), read=_read_labelled)


def check_data(experiment: ExperimentConfig) -> int:
    """Looks at the first rows of each file of a run; returns how many files there are.

    Raises:
        ConfigError: the recipe names no data.
        DataError: a file cannot be used; names file, line and field.
    """
    require_named_data(experiment.data)
    files = [*data_files(experiment), *_labelled_files(experiment)]
    for file in files:
        file.look_at()
    return len(files)


def require_named_data(data: DataConfig) -> None:
    """Raises ConfigError where pairs come from files or from the hub, and none is named."""
    if data.source != "planted" and not data.preferences:
        raise ConfigError(f'data.preferences = (): data.source = "{data.source}" needs at least one data set')


def pair_file(path: str, data_format: str, objectives: Sequence[str]) -> DataFile:
    """A file of preference pairs.

    Args:
        data_format: a key of `ADAPTERS`.
    """
    return DataFile(path=path, read=partial(_read_pairs, data_format=data_format, objectives=tuple(objectives)))


def resolve(path: str) -> str:
    """A data path of a recipe: relative paths start at VRM_DATA_ROOT, or at the working directory without it."""
    return os.path.join(os.environ.get(DATA_ROOT, ""), path)


def _read_prompts(rows: Iterable[Row], *, fields: Sequence[str]) -> None:
    for row in rows:
        prompt_of(row, fields)


def _read_labelled(rows: Iterable[Row]) -> None:
    for row in rows:
        labelled_response(row)


def _read_pairs(rows: Iterable[Row], *, data_format: str, objectives: tuple[str, ...]) -> None:
    for _ in ADAPTERS[data_format](rows, objectives, 0):
        pass
