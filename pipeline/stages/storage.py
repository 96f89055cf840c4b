"""Directories behind a URI: a local path, or anything pyarrow.fs can reach (s3://, gs://, hdfs://, ...).

Local paths are used in place. Remote ones are staged through a temporary directory, so that libraries that only know
local files can write them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow
from pyarrow import fs

from pipeline.errors import WorkspaceError


def is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> str:
    return uri.removeprefix("file://")


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


@contextmanager
def writing(uri: str) -> Iterator[str]:
    """A local directory to fill; its contents stand at `uri` when the block ends without an error.

    Several ranks may write different files of one directory at the same time.
    """
    if is_local(uri):
        os.makedirs(local_path(uri), exist_ok=True)
        yield local_path(uri)
        return
    filesystem, path = _resolve(uri)
    with tempfile.TemporaryDirectory() as directory:
        yield directory
        filesystem.create_dir(path, recursive=True)
        fs.copy_files(directory, path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem)


@contextmanager
def reading(uri: str) -> Iterator[str]:
    """A local directory with the contents of `uri`."""
    if is_local(uri):
        yield local_path(uri)
        return
    filesystem, path = _resolve(uri)
    with tempfile.TemporaryDirectory() as directory:
        fs.copy_files(path, directory, source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())
        yield directory


def read_text(uri: str) -> str | None:
    """The text of a file; None when it does not exist."""
    filesystem, path = _resolve(uri)
    if filesystem.get_file_info(path).type != fs.FileType.File:
        return None
    with filesystem.open_input_stream(path) as stream:
        return stream.read().decode()


def write_text(uri: str, text: str) -> None:
    """Writes a small file so that a reader sees the old text or the new, never half of it."""
    if is_local(uri):
        path = local_path(uri)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = f"{path}.partial-{os.getpid()}"
        with open(partial, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
        return
    # Object stores show an upload only once it is complete; other remote file systems get the same by a rename.
    filesystem, path = _resolve(uri)
    filesystem.create_dir(os.path.dirname(path), recursive=True)
    with filesystem.open_output_stream(path) as stream:
        stream.write(text.encode())


def list_directories(uri: str) -> list[str]:
    """Names of the directories directly below `uri`, sorted; empty when it does not exist."""
    filesystem, path = _resolve(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)


def delete_directory(uri: str) -> None:
    """Removes a directory and everything in it; it may be missing."""
    filesystem, path = _resolve(uri)
    if filesystem.get_file_info(path).type == fs.FileType.Directory:
        filesystem.delete_dir(path)


def delete_file(uri: str) -> None:
    """Removes a file; it may be missing."""
    filesystem, path = _resolve(uri)
    if filesystem.get_file_info(path).type == fs.FileType.File:
        filesystem.delete_file(path)


def size_bytes(uri: str) -> int:
    """Bytes of all files below `uri`."""
    filesystem, path = _resolve(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    return sum(info.size or 0 for info in infos)


def _resolve(uri: str) -> tuple[fs.FileSystem, str]:
    if is_local(uri):
        return fs.LocalFileSystem(), os.path.abspath(local_path(uri))
    try:
        return fs.FileSystem.from_uri(uri)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise WorkspaceError(f"{uri} cannot be opened: {error}. Give a local path or a URI that pyarrow.fs knows.") from error
