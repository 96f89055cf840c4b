"""Directories behind a URI: a local path, or anything pyarrow.fs can reach (s3://, gs://, hdfs://, ...).

Local paths are used in place. Remote ones are staged through a temporary directory, so that libraries that only know
local files can write them.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow
from pyarrow import fs
from safetensors import SafetensorError

from pipeline.errors import WorkspaceError

OBJECT_STORES = {"s3", "gcs", "abfs"}
"""File systems that show an upload only once it is complete, and that cannot rename."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""The disk, the user's share of it, or the largest file the process may write."""


def is_local(uri: str) -> bool:
    """Whether the URI is a path of this machine."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> str:
    """The path of a local URI."""
    return uri.removeprefix("file://")


def join(uri: str, *parts: str) -> str:
    """The URI of something below `uri`."""
    return "/".join([uri.rstrip("/"), *parts])


@contextmanager
def writing(uri: str) -> Iterator[str]:
    """A local directory to fill; its contents are at `uri` when the block ends without an error.

    Several ranks may write different files of one directory at the same time.

    Raises:
        WorkspaceError: no space is left.
    """
    with explaining_full_disk(uri):
        if is_local(uri):
            os.makedirs(local_path(uri), exist_ok=True)
            yield local_path(uri)
            return
        with tempfile.TemporaryDirectory() as directory:
            yield directory
            copy(directory, uri)


@contextmanager
def explaining_full_disk(uri: str) -> Iterator[None]:
    """Turns the error of a block that finds no space to write `uri` into one that says what to do.

    Raises:
        WorkspaceError: no space is left.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if _errno(error) not in FULL:
            raise
        raise WorkspaceError(
            f"no space is left while writing {uri}. Free some, or move the workspace; the same command then resumes."
        ) from error


@contextmanager
def reading(uri: str) -> Iterator[str]:
    """A local directory with the contents of `uri`."""
    if is_local(uri):
        yield local_path(uri)
        return
    with tempfile.TemporaryDirectory() as directory:
        copy(uri, directory)
        yield directory


def copy(source: str, destination: str) -> None:
    """Copies the contents of a directory into another, either of them remote; files of the same name are replaced."""
    from_filesystem, from_path = _resolve(source)
    to_filesystem, to_path = _resolve(destination)
    to_filesystem.create_dir(to_path, recursive=True)
    fs.copy_files(from_path, to_path, source_filesystem=from_filesystem, destination_filesystem=to_filesystem)


def read_text(uri: str) -> str | None:
    """The text of a file, undecodable bytes replaced; None when it does not exist."""
    filesystem, path = _resolve(uri)
    if filesystem.get_file_info(path).type != fs.FileType.File:
        return None
    with filesystem.open_input_stream(path) as stream:
        return stream.read().decode(errors="replace")


def write_text(uri: str, text: str) -> None:
    """Writes a small file so that a reader sees the old text or the new, never half of it.

    Locally it also survives a power failure. A remote file system that can rename may show no file for a moment
    when there was one before. Commits are written once, so they are never in that state.

    Raises:
        WorkspaceError: no space is left.
    """
    if is_local(uri):
        with explaining_full_disk(uri):
            _write_local(local_path(uri), text)
        return
    filesystem, path = _resolve(uri)
    filesystem.create_dir(os.path.dirname(path), recursive=True)
    uploaded = path if filesystem.type_name in OBJECT_STORES else f"{path}.partial"
    with filesystem.open_output_stream(uploaded) as remote:
        remote.write(text.encode())
    if uploaded != path:
        delete_file(uri)
        filesystem.move(uploaded, path)


def _write_local(path: str, text: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.partial", "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(f"{path}.partial", path)
    _sync(os.path.dirname(path))


def make_durable(uri: str) -> None:
    """Waits until the files below `uri` are on disk, so that a commit written after them never outlives them.

    Remote file systems are durable once a file is closed.

    Raises:
        WorkspaceError: no space is left, which some file systems find out only now.
    """
    if not is_local(uri):
        return
    with explaining_full_disk(uri):
        for directory, _, files in os.walk(local_path(uri)):
            for name in files:
                _sync(os.path.join(directory, name))
            _sync(directory)


def require_writable(uri: str, *, needs_bytes: int) -> None:
    """Proves with a small file that `uri` can be written, and compares the free space with an estimate.

    Raises:
        WorkspaceError: it cannot be written, or has less than `needs_bytes` free.
    """
    # A name of its own: two jobs may try one workspace at the same moment.
    probe = join(uri, f"probe-{uuid.uuid4().hex}.txt")
    try:
        write_text(probe, "written before anything expensive")
        delete_file(probe)
    except OSError as error:
        raise WorkspaceError(
            f"{uri} cannot be written: {error}. Choose another --workspace, or correct its permissions."
        ) from error
    if not is_local(uri):
        return
    free = shutil.disk_usage(local_path(uri)).free
    if free < needs_bytes:
        raise WorkspaceError(
            f"{uri} has {free / 2**30:.1f} GiB free, the run needs about {needs_bytes / 2**30:.1f} GiB. "
            "Free some, or choose another --workspace."
        )


def list_directories(uri: str) -> list[str]:
    """Names of the directories directly below `uri`, sorted; empty when it does not exist."""
    filesystem, path = _resolve(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)


def file_sizes(uri: str) -> dict[str, int]:
    """Name -> bytes of the files directly below `uri`, sorted by name; empty when it does not exist."""
    filesystem, path = _resolve(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return {info.base_name: info.size or 0 for info in sorted(infos, key=lambda info: info.base_name) if info.is_file}


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
        raise WorkspaceError(
            f"{uri} cannot be opened: {error}. Give a local path or a URI that pyarrow.fs knows."
        ) from error


def _errno(error: OSError | SafetensorError) -> int | None:
    """The error number. Safetensors writes in Rust and has it only in the text: "... (os error 28)"."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
