"""Rows of JSONL, JSON and Parquet files, each knowing where it stands."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq
from pyarrow import ArrowInvalid

from pipeline.errors import DataError

T = TypeVar("T")

DECODER = json.JSONDecoder()
WHITE = re.compile(r"\s*")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a data file."""

    place: str
    """"<file>, line <n>" or "<file>, row <n>": what an error message needs."""
    number: int
    """1-based."""
    values: dict[str, Any]

    def require(self, field: str, kind: type[T] | tuple[type[T], ...]) -> T:
        """The value of a field.

        Raises:
            DataError: the field is missing or of another kind.
        """
        value = self.values.get(field)
        if not isinstance(value, kind):
            raise DataError(f"{self.place}, field {field!r}: {value!r:.60} is no {_name(kind)}")
        return value


def _name(kind: type | tuple[type, ...]) -> str:
    return " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))


def read_rows(path: str) -> Iterator[Row]:
    """Streams the rows of a .jsonl or .parquet file, or of every such file in a directory; or of a .json list.

    Raises:
        DataError: the file is missing, of another kind, or a line is no JSON object in UTF-8.
    """
    file = Path(path)
    if file.is_dir():
        parts = sorted(p for p in file.iterdir() if p.suffix in (".jsonl", ".parquet"))
        if not parts:
            raise DataError(f"{path} is a directory without .jsonl or .parquet files")
        for part in parts:
            yield from read_rows(str(part))
        return
    if not file.exists():
        raise DataError(
            f"{path} does not exist (looked in {Path.cwd()}). Relative paths in a recipe start at VRM_DATA_ROOT."
        )
    match file.suffix:
        case ".jsonl":
            yield from _read_jsonl(file)
        case ".parquet":
            yield from _read_parquet(file)
        case ".json":
            yield from _read_json(file)
        case suffix:
            raise DataError(f"{path}: files of kind {suffix!r} are not read; give .jsonl, .json or .parquet")


def _read_jsonl(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:  # bytes: a decoding error then belongs to one line
        for number, raw in enumerate(lines, start=1):
            place = f"{file}, line {number}"
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: no UTF-8 ({error.reason} at byte {error.start + 1})") from error
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{place}: no JSON ({error.msg} at column {error.colno}): {line.strip():.60}"
                ) from error
            if not isinstance(values, dict):
                raise DataError(f"{place}: {line.strip():.60} is JSON but no object")
            yield Row(place=place, number=number, values=values)


def _read_json(file: Path) -> Iterator[Row]:
    """The objects of a list. One after the other, so that each knows its line, and a cut file where it ends."""
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: no UTF-8 ({error.reason} at byte {error.start + 1})") from error
    at, line, counted = _behind(text, 0), 1, 0
    if not text.startswith("[", at):
        raise DataError(f"{file}: a .json file must hold a list of objects, not {text[at : at + 20]!r}")
    at = _behind(text, at + 1)
    number = 0
    while not text.startswith("]", at):
        number += 1
        line, counted = line + text.count("\n", counted, at), at
        place = f"{file}, row {number} (line {line})"
        try:
            values, at = DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{place}: no JSON ({error.msg} at line {error.lineno}). Was the file cut short?"
            ) from error
        if not isinstance(values, dict):
            raise DataError(f"{place}: {values!r:.60} is JSON but no object")
        yield Row(place=place, number=number, values=values)
        at = _behind(text, at)
        if text.startswith(",", at):
            at = _behind(text, at + 1)
        elif not text.startswith("]", at):
            raise DataError(f"{place}: no comma or ] behind it. Was the file cut short?")


def _behind(text: str, at: int) -> int:
    """Where the next character stands that is not white."""
    return WHITE.match(text, at).end()  # type: ignore[union-attr]


def _read_parquet(file: Path) -> Iterator[Row]:
    try:
        table = pq.ParquetFile(file)
    except ArrowInvalid as error:
        raise DataError(f"{file}: no Parquet file: {error}") from error
    number = 0
    for batch in table.iter_batches(batch_size=1024):
        for values in batch.to_pylist():
            number += 1
            yield Row(place=f"{file}, row {number}", number=number, values=values)


def content_fingerprint(path: str) -> str:
    """SHA-256 over the bytes of a file, or of every data file in a directory: a changed file is another input."""
    digest = hashlib.sha256()
    file = Path(path)
    for part in sorted(file.iterdir()) if file.is_dir() else [file]:
        if part.is_file():
            with part.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
