"""Directories behind a URI: a local path, an object store (s3://, gs://), or what else pyarrow.fs can reach (hdfs://).

Local paths are used in place. Remote ones are staged through a temporary directory, so that libraries that only know
local files can write them. A URI may end in a query, which says how its server is reached:
`s3://bucket/runs?endpoint_override=127.0.0.1:9000&scheme=http`. Credentials are never part of a URI.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pyarrow
from pyarrow import fs
from safetensors import SafetensorError

from pipeline.errors import WorkspaceError
from pipeline.stages import object_store
from pipeline.stages.object_store import ObjectPlace

WHOLE_UPLOADS = {"abfs"}
"""File systems of pyarrow that show an upload only once it is complete, and that cannot rename."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""The disk, the user's share of it, or the largest file the process may write."""


def is_local(uri: str) -> bool:
    """Whether the URI is a path of this machine."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> str:
    """The path of a local URI."""
    return uri.removeprefix("file://")


def join(uri: str, *parts: str) -> str:
    """The URI of something below `uri`; its query stays at the end."""
    path, mark, query = (uri, "", "") if is_local(uri) else uri.partition("?")
    return "/".join([path.rstrip("/"), *parts]) + mark + query


def parent(uri: str) -> str:
    """The URI of the directory that holds `uri`."""
    path, mark, query = (uri, "", "") if is_local(uri) else uri.partition("?")
    return path.rstrip("/").rpartition("/")[0] + mark + query


def check_uri(uri: str) -> None:
    """Refuses a URI that cannot be meant, without asking any server.

    Raises:
        WorkspaceError: it carries credentials, or names no place.
    """
    if uri.startswith("file:") and not uri.startswith("file:///"):
        raise WorkspaceError(f"{uri} names no path of this machine. Write file:///PATH, or the path alone.")
    _objects(uri)


def _refuse_credentials(uri: str) -> None:
    """Raises for a URI that carries a password, which logs, manifests and the list of processes would show.

    Raises:
        WorkspaceError: the message does not repeat the password.
    """
    match = re.match(r"([^/?]*://)[^/?@]*:[^/?@]*@(.*)", uri)
    if match is not None:
        raise WorkspaceError(
            f"{match[1]}...@{match[2]} carries credentials, which would be shown wherever the URI is. Set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or what your storage reads) in the environment instead."
        )


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
    from_objects, to_objects = _objects(source), _objects(destination)
    if to_objects is not None:
        with reading(source) as directory:
            object_store.upload(directory, to_objects)
        return
    if from_objects is not None:
        with writing(destination) as directory:
            object_store.download(from_objects, directory)
        return
    from_filesystem, from_path = _resolve(source)
    to_filesystem, to_path = _resolve(destination)
    to_filesystem.create_dir(to_path, recursive=True)
    fs.copy_files(from_path, to_path, source_filesystem=from_filesystem, destination_filesystem=to_filesystem)


def read_text(uri: str) -> str | None:
    """The text of a file, undecodable bytes replaced; None when it does not exist."""
    objects = _objects(uri)
    if objects is not None:
        data = object_store.read(objects)
        return None if data is None else data.decode(errors="replace")
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
    objects = _objects(uri)
    if objects is not None:
        object_store.write(objects, text.encode())
        return
    if is_local(uri):
        with explaining_full_disk(uri):
            path = local_path(uri)
            _write_partial(path, f"{path}.partial", text)
            os.replace(f"{path}.partial", path)
            _sync(os.path.dirname(path))
        return
    filesystem, path = _resolve(uri)
    filesystem.create_dir(os.path.dirname(path), recursive=True)
    uploaded = path if filesystem.type_name in WHOLE_UPLOADS else f"{path}.partial"
    with filesystem.open_output_stream(uploaded) as remote:
        remote.write(text.encode())
    if uploaded != path:
        delete_file(uri)
        filesystem.move(uploaded, path)


def _write_partial(path: str, partial: str, text: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(partial, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def create_text(uri: str, text: str) -> bool:
    """Writes a small file only if there is none, so that of many callers exactly one is told True.

    That holds on local and shared file systems, for the link of a file is made once, and on object stores, by a
    conditional write. Other file systems (hdfs, abfs) have neither: the file is looked for and then written, so callers
    of the same moment may all be told True.

    Args:
        text: of this caller alone, for two equal texts cannot be told apart.

    Raises:
        WorkspaceError: no space is left, or the place cannot be used.
    """
    objects = _objects(uri)
    if objects is not None:
        return object_store.create(objects, text.encode())
    if not is_local(uri):
        if read_text(uri) is not None:
            return False
        write_text(uri, text)
        return True
    with explaining_full_disk(uri):
        path = local_path(uri)
        partial = f"{path}.{uuid.uuid4().hex}.partial"
        _write_partial(path, partial, text)
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
        finally:
            os.remove(partial)
        _sync(os.path.dirname(path))
        return True


def replace_text(uri: str, text: str, *, expected: str) -> bool:
    """Replaces a small file only if it holds `expected`. False if it holds something else by then, or is gone.

    Locally a lock lets the callers of one machine go one after another. Other file systems are as in `create_text`.

    Raises:
        WorkspaceError: no space is left, or the place cannot be used.
    """
    objects = _objects(uri)
    if objects is not None:
        return object_store.replace(objects, text.encode(), expected=expected.encode())
    if read_text(uri) != expected:
        return False
    with _one_at_a_time(uri):
        if read_text(uri) != expected:
            return False
        write_text(uri, text)
        return True


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    if not is_local(uri):
        yield
        return
    with open(f"{local_path(uri)}.lock", "a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def write_pieces(uri: str, pieces: Iterable[memoryview], *, num_bytes: int) -> None:
    """Writes a large file piece by piece, from where the pieces lie: no second copy of it is made.

    An object store gets it by parts, several at a time, and shows the file once it has all of them.

    Args:
        num_bytes: of all pieces together.

    Raises:
        WorkspaceError: no space is left, or the place cannot be used.
    """
    objects = _objects(uri)
    if objects is not None:
        object_store.write_pieces(objects, pieces, num_bytes=num_bytes)
        return
    with explaining_full_disk(uri):
        filesystem, path = _resolve(uri)
        filesystem.create_dir(os.path.dirname(path), recursive=True)
        with filesystem.open_output_stream(path) as stream:
            for piece in pieces:
                stream.write(piece)


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
    name, objects = f"probe-{uuid.uuid4().hex}.txt", _objects(uri)
    probe = join(uri, name)
    try:
        if objects is not None:
            object_store.write(objects.holding(name), b"written before anything expensive", patient=False)
        else:
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
    objects = _objects(uri)
    if objects is not None:
        return object_store.list_directories(objects)
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
    objects = _objects(uri)
    if objects is not None:
        object_store.delete_below(objects)
        return
    filesystem, path = _resolve(uri)
    if filesystem.get_file_info(path).type == fs.FileType.Directory:
        filesystem.delete_dir(path)


def delete_file(uri: str) -> None:
    """Removes a file; it may be missing."""
    objects = _objects(uri)
    if objects is not None:
        object_store.delete(objects)
        return
    filesystem, path = _resolve(uri)
    if filesystem.get_file_info(path).type == fs.FileType.File:
        filesystem.delete_file(path)


def size_bytes(uri: str) -> int:
    """Bytes of all files below `uri`."""
    objects = _objects(uri)
    if objects is not None:
        return sum(entry.num_bytes for entry in object_store.list_objects(objects))
    filesystem, path = _resolve(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    return sum(info.size or 0 for info in infos)


def _objects(uri: str) -> ObjectPlace | None:
    """The place in an object store; None for paths and for what pyarrow reaches.

    Raises:
        WorkspaceError: the URI carries credentials, or means nothing.
    """
    if is_local(uri):
        return None
    _refuse_credentials(uri)
    return ObjectPlace.of(uri)


def _resolve(uri: str) -> tuple[fs.FileSystem, str]:
    if is_local(uri):
        return fs.LocalFileSystem(), os.path.abspath(local_path(uri))
    try:
        return fs.FileSystem.from_uri(uri)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise WorkspaceError(
            f"{uri} cannot be opened: {error}. Give a local path or a URI that begins with s3:// or gs://, or another "
            "that pyarrow.fs knows."
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
