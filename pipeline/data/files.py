"""Rows of JSONL, JSON and Parquet files, each with its place in the file; files that grow by lines."""

from __future__ import annotations

import codecs
import fcntl
import filecmp
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow.parquet as pq
from pyarrow import ArrowInvalid, RecordBatch

from pipeline.errors import DataError, WorkspaceError, WorkspaceLocked

T = TypeVar("T")

WHITE = re.compile(r"\s*")


class RepeatedKey(Exception):
    """A JSON object names one key twice; a parser would keep the last value without a word."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        [(key, count)] = Counter(key for key, _ in pairs).most_common(1)
        raise RepeatedKey(f"the key {key!r:.80} stands {count} times in one object. Keep one of them.")
    return values


DECODER = json.JSONDecoder(object_pairs_hook=_object)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a data file."""

    place: str
    """"<file>, line <n>" or "<file>, row <n>": what an error message needs."""
    number: int
    """Number of the row in its file, from 1."""
    values: dict[str, Any]

    @property
    def identity(self) -> str:
        """Its `id`; where that is absent, null, NaN or empty, its place: never one value for many rows.

        The place without the directory: what follows from an identity, such as a flipped label, must not depend on
        where the data lie.
        """
        value = self.values.get("id")
        return self.place.rpartition("/")[2] if value is None or value == "" or value != value else str(value)

    @property
    def found(self) -> str:
        """The fields that have a value, for the message about one that has none."""
        names = ", ".join(sorted(name for name, value in self.values.items() if value is not None))
        return f"the fields with a value are {names or 'none'}"

    def require(self, field: str, kind: type[T] | tuple[type[T], ...]) -> T:
        """The value of a field.

        Raises:
            DataError: the field is missing or of another kind. A truth value is no number, though Python's `bool` is an
                `int`.
        """
        value = self.values.get(field)
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in _kinds(kind)):
            found = f"; {self.found}" if value is None else ""
            raise DataError(f"{self.place}, field {field!r}: {value!r:.60} is no {_name(kind)}{found}")
        return value


def _kinds(kind: type | tuple[type, ...]) -> tuple[type, ...]:
    return kind if isinstance(kind, tuple) else (kind,)


def _name(kind: type | tuple[type, ...]) -> str:
    return " or ".join(each.__name__ for each in _kinds(kind))


def distinct(identities: Iterable[str]) -> Iterator[str]:
    """The identities in their order; one that occurs again gets the number of its occurrence."""
    seen: Counter[str] = Counter()
    for identity in identities:
        seen[identity] += 1
        yield identity if seen[identity] == 1 else f"{identity} ({seen[identity]})"


def read_rows(path: str) -> Iterator[Row]:
    """Streams the rows of a .jsonl or .parquet file, or of every such file in a directory; or of a .json list.

    Raises:
        DataError: the file is missing, of another kind, or a line is no JSON object in UTF-8, has a key twice, or a
            text that cannot be encoded.
    """
    for file in data_parts(path):
        yield from _read_part(file)


def data_parts(path: str) -> list[Path]:
    """The file itself, or the .jsonl and .parquet files of a directory.

    Raises:
        DataError: nothing is there, or the directory holds no such file.
    """
    file = Path(path)
    if file.is_dir():
        parts = sorted(part for part in file.iterdir() if part.suffix in (".jsonl", ".parquet"))
        if not parts:
            raise DataError(f"{path} is a directory without .jsonl or .parquet files")
        return parts
    if not file.exists():
        raise DataError(
            f"{path} does not exist (looked in {Path.cwd()}). Relative paths in a recipe start at VRM_DATA_ROOT."
        )
    return [file]


def require_distinct_files(paths: Sequence[str]) -> None:
    """Refuses a file whose content is read twice: its rows would count double.

    Args:
        paths: files or directories that are read one after the other.

    Raises:
        DataError: two files have the same content, or a file does not exist; names both.
    """
    by_size: dict[int, list[Path]] = {}
    for file in (file for path in paths for file in data_parts(path)):
        # Only files of one size are read through.
        for other in by_size.setdefault(file.stat().st_size, []):
            if filecmp.cmp(file, other, shallow=False):
                raise DataError(f"{file} is the same as {other}, so its rows would count twice. Name it once.")
        by_size[file.stat().st_size].append(file)


def first_rows(path: str, count: int) -> Iterator[Row]:
    """Streams the first rows of each file behind a path. Raises as `read_rows`."""
    for file in data_parts(path):
        yield from itertools.islice(_read_part(file), count)


def _read_part(file: Path) -> Iterator[Row]:
    match file.suffix:
        case ".jsonl":
            yield from _read_jsonl(file)
        case ".parquet":
            yield from _read_parquet(file)
        case ".json":
            yield from _read_json(file)
        case suffix:
            raise DataError(f"{file}: files of kind {suffix!r} are not read; give .jsonl, .parquet or .json")


def read_hub_rows(name: str, split: str, *, remedy: str) -> Iterator[Row]:
    """Streams the rows of a data set of the Hugging Face hub.

    Args:
        remedy: what to do with the downloaded files where the hub is out of reach, for the error message.

    Raises:
        DataError: it cannot be opened.
    """
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:  # not reachable, not there, or without a split of this name
        raise DataError(
            f"the hub's data set {name!r} cannot be opened: {error}. Check the name and the network, or download "
            f"it and {remedy}."
        ) from error
    for number, values in enumerate(dataset, start=1):
        yield _row(f"{name}, row {number}", number, values)


def read_json(file: Path) -> Any:
    """The value of a whole JSON file.

    Raises:
        DataError: it is no JSON in UTF-8, has a key twice in one object, or a text that cannot be encoded.
    """
    try:
        value = DECODER.decode(_decoded(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: no JSON ({error.msg} at line {error.lineno})") from error
    except RepeatedKey as error:
        raise DataError(f"{file}: {error}") from error
    _require_whole_characters(str(file), value)
    return value


def _decoded(file: Path) -> str:
    try:
        return file.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: no UTF-8 ({error.reason} at byte {error.start + 1})") from error


def _row(place: str, number: int, values: dict[str, Any]) -> Row:
    """Every reader makes its rows here.

    Raises:
        DataError: a text holds half a surrogate pair.
    """
    _require_whole_characters(place, values)
    return Row(place=place, number=number, values=values)


def _require_whole_characters(place: str, value: Any) -> None:
    """Refuses half a surrogate pair: JSON can spell it, but no tokenizer and no file can take it."""
    for name, text in _texts("", value):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place}, field {name!r}: character {error.start + 1} is half a surrogate pair "
                f"({text[error.start]!r}), as where an emoji was cut in two. Remove it."
            ) from error


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every text in a value, keys too, with the field that it stands in."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            inner = f"{name}.{key}" if name else str(key)
            yield inner, str(key)
            yield from _texts(inner, item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(name, item)


def _read_jsonl(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:  # bytes: a decoding error then belongs to one line
        for number, raw in enumerate(lines, start=1):
            place = f"{file}, line {number}"
            try:
                # Some editors begin a file with a byte-order mark; joined files have marks in between.
                line = raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: no UTF-8 ({error.reason} at byte {error.start + 1})") from error
            if not line.strip():
                continue
            try:
                values = DECODER.decode(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{place}: no JSON ({error.msg} at column {error.colno}): {line.strip():.60}"
                ) from error
            except RepeatedKey as error:
                raise DataError(f"{place}: {error}") from error
            if not isinstance(values, dict):
                raise DataError(f"{place}: {line.strip():.60} is JSON but no object")
            yield _row(place, number, values)


def _read_json(file: Path) -> Iterator[Row]:
    """The objects of a list. One after the other, so that each knows its line, and a cut file where it ends."""
    text = _decoded(file)
    at, line, counted = _skip_white_space(text, 0), 1, 0
    if not text.startswith("[", at):
        raise DataError(f"{file}: a .json file must hold a list of objects, not {text[at : at + 20]!r}")
    at = _skip_white_space(text, at + 1)
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
        except RepeatedKey as error:
            raise DataError(f"{place}: {error}") from error
        if not isinstance(values, dict):
            raise DataError(f"{place}: {values!r:.60} is JSON but no object")
        yield _row(place, number, values)
        at = _skip_white_space(text, at)
        if text.startswith(",", at):
            at = _skip_white_space(text, at + 1)
        elif not text.startswith("]", at):
            raise DataError(f"{place}: no comma or ] follows it. Was the file cut short?")


def _skip_white_space(text: str, at: int) -> int:
    """The position of the next character, from `at` on, that is not white space."""
    return WHITE.match(text, at).end()  # type: ignore[union-attr]


def _read_parquet(file: Path) -> Iterator[Row]:
    try:
        table = pq.ParquetFile(file)
    except ArrowInvalid as error:
        raise DataError(f"{file}: no Parquet file: {error}") from error
    number = 0
    for batch in table.iter_batches(batch_size=1024):
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError as error:  # the format asks for UTF-8, but not every writer looks
            raise DataError(_undecodable(file, number, batch)) from error
        for values in rows:
            number += 1
            yield _row(f"{file}, row {number}", number, values)


def _undecodable(file: Path, before: int, batch: RecordBatch) -> str:
    """Names the first text of a batch that is no UTF-8; `before` rows stand before the batch."""
    for index, (name, column) in itertools.product(
        range(batch.num_rows), zip(batch.schema.names, batch.columns, strict=True)
    ):
        try:
            column[index].as_py()
        except UnicodeDecodeError as error:
            return (
                f"{file}, row {before + index + 1}, field {name!r}: no UTF-8 ({error.reason} at byte {error.start + 1})"
            )
    return f"{file}: no UTF-8 after row {before}"


class AppendedLines:
    """A file of JSON objects, one a line, that only grows: what a killed run had written is there for the next one."""

    def __init__(self, stream: BinaryIO, content: bytes) -> None:
        self._stream = stream
        self.content = content
        """The complete lines that the file had when it was opened."""

    @classmethod
    @contextmanager
    def open(cls, path: Path, *, option: str) -> Iterator[AppendedLines]:
        """Makes the file where it does not exist. A last line that a kill cut short is dropped.

        Args:
            option: the option that names another file, for the error message.

        Raises:
            WorkspaceLocked: another run appends to it.
            WorkspaceError: it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = path.open("a+b")
        except OSError as error:
            raise WorkspaceError(
                f"{path} cannot be written: {error}. Correct the cause, or choose another {option}."
            ) from error
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise WorkspaceLocked(
                    f"another run appends to {path}. Wait for it, or give this one {option} of its own."
                ) from error
            stream.seek(0)
            content = stream.read()
            whole = content.rfind(b"\n") + 1
            # Opened for appending: writes go to the new end.
            stream.truncate(whole)
            yield cls(stream, content[:whole])

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one line; it is in the file when this returns.

        Raises:
            WorkspaceError: it cannot be written.
        """
        try:
            self._stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            self._stream.flush()
        except OSError as error:
            raise WorkspaceError(
                f"{self._stream.name} cannot be written: {error}. Correct the cause and run the same command "
                "again: what the file holds is kept."
            ) from error


def content_fingerprint(path: str) -> str:
    """SHA-256 over the bytes of a file, or of every data file in a directory: a changed file is another input."""
    digest = hashlib.sha256()
    file = Path(path)
    for part in sorted(file.iterdir()) if file.is_dir() else [file]:
        if part.is_file():
            with part.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
