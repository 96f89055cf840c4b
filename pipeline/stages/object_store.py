"""Objects behind s3:// and gs://, through obstore.

An object appears whole or not at all. A conditional write creates it only if it is absent, or replaces it only if
nobody else has: If-None-Match and If-Match on S3, the generation on Google's storage.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace as replace_field
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import parse_qsl

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import GCSStore, S3Store
from pyarrow import fs

from pipeline.errors import WorkspaceError

if TYPE_CHECKING:
    from obstore import UpdateVersion

SCHEMES = {"s3": "S3", "gs": "Google's storage", "gcs": "Google's storage"}
QUERY_KEYS = ("endpoint_override", "scheme", "region")
"""Those of pyarrow's URIs, so that one URI names the same place here and there."""
PART_BYTES = 16 * 2**20
"""Of an upload or a download. S3 takes at least 5 MiB."""
MOST_PARTS = 10_000
"""Of one object, on S3."""
PARTS_AT_ONCE = 8
"""Uploading, so many parts of one file are in memory."""
REQUEST_S = 120
"""For one part."""
RETRY = {"max_retries": 10, "retry_timeout": timedelta(seconds=180)}
ROLES = ("/latest/api/token", "/computeMetadata/")
"""In the address that the library asks for the machine's role, at last: nothing else gave credentials."""
NO_RETRY = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
"""For the first request of a job: a wrong address is wrong at once."""

ADDRESS = re.compile(r"([\w.-]+|\[[0-9a-fA-F:]+\])(:\d+)?")
"""A host, and the port where it is not the usual one."""

Store: TypeAlias = S3Store | GCSStore
Settings: TypeAlias = tuple[tuple[str, str], ...]


def _check_settings(place: str, settings: Sequence[tuple[str, str]]) -> None:
    """
    Args:
        place: without the query, whose values may be secret: no message repeats those of unknown keys.

    Raises:
        WorkspaceError: a key means nothing, is there twice, or has a value that means nothing.
    """
    names = [name for name, _ in settings]
    unknown = [name for name in names if name not in QUERY_KEYS]
    if unknown:
        raise WorkspaceError(
            f"{place} has {', '.join(unknown)} in its query, which means nothing here; it may have "
            f"{', '.join(QUERY_KEYS)}. Give credentials in the environment, where no log shows them."
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise WorkspaceError(f"{place} has {', '.join(twice)} twice in its query. Leave one.")
    values = dict(settings)
    address, protocol = values.get("endpoint_override"), values.get("scheme", "https")
    if address is not None and not ADDRESS.fullmatch(address):
        raise WorkspaceError(
            f"{place} has endpoint_override={address}, which is no address. Write HOST or HOST:PORT, and "
            "scheme=http beside it where the server has no TLS."
        )
    if protocol not in ("http", "https"):
        raise WorkspaceError(f"{place} has scheme={protocol} in its query. Write http or https.")


@dataclass(frozen=True, kw_only=True)
class ObjectPlace:
    """What a URI like `s3://bucket/a/b?endpoint_override=127.0.0.1:9000&scheme=http` names."""

    uri: str
    scheme: str
    bucket: str
    key: str
    settings: Settings
    """The query, checked."""

    @classmethod
    def of(cls, uri: str) -> ObjectPlace | None:
        """None for a URI of another scheme.

        Raises:
            WorkspaceError: it names no bucket, or its query has a key that means nothing.
        """
        scheme, separator, rest = uri.partition("://")
        if not separator or scheme not in SCHEMES:
            return None
        path, _, query = rest.partition("?")
        bucket, _, key = path.partition("/")
        if not bucket:
            raise WorkspaceError(f"{uri} names no bucket. Write {scheme}://BUCKET/PATH.")
        settings = parse_qsl(query, keep_blank_values=True)
        _check_settings(f"{scheme}://{path}", settings)
        parts = [part for part in key.split("/") if part]
        if {".", ".."} & set(parts):
            raise WorkspaceError(f"{uri} has . or .. in its path, which a bucket does not know. Write the whole path.")
        return cls(uri=uri, scheme=scheme, bucket=bucket, key="/".join(parts), settings=tuple(sorted(settings)))

    @property
    def endpoint(self) -> str | None:
        """The address of the server, as a URL; None for the cloud's own."""
        settings = dict(self.settings)
        if "endpoint_override" in settings:
            return f"{settings.get('scheme', 'https')}://{settings['endpoint_override']}"
        if self.scheme == "s3":
            return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return None

    def holding(self, name: str) -> ObjectPlace:
        """The place of an object below this one; messages name this one."""
        return replace_field(self, key=f"{self.key}/{name}" if self.key else name)

    def store(self, *, patient: bool = True) -> Store:
        """A client of the bucket, which this process keeps."""
        return _store(self.scheme, self.bucket, self.settings, self.endpoint, patient, os.getpid())


@lru_cache(maxsize=64)
def _store(scheme: str, bucket: str, settings: Settings, endpoint: str | None, patient: bool, process: int) -> Store:
    """
    Args:
        process: a child of fork has none of the client's threads, so it makes a client of its own.
    """
    timeout = timedelta(seconds=REQUEST_S)
    options: dict[str, Any] = {
        "client_options": {"timeout": timeout, "allow_http": (endpoint or "").startswith("http://")},
        "retry_config": RETRY if patient else NO_RETRY,
    }
    if scheme != "s3":
        return GCSStore(bucket, **options | ({} if endpoint is None else {"base_url": endpoint}))
    region = dict(settings).get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and endpoint is None:
        region = _region_of(bucket)
    options |= {"region": region or "us-east-1"} | ({} if endpoint is None else {"endpoint": endpoint})
    return S3Store(bucket, **options | _credentials())


def _region_of(bucket: str) -> str | None:
    try:
        return fs.resolve_s3_region(bucket)
    except OSError:  # no such bucket, or no network: the first request says so with its own words
        return None


def _credentials() -> dict[str, Any]:
    """Empty where obstore finds them: in the environment, or from the machine's role.

    Raises:
        WorkspaceError: they are in a profile, and the library that reads profiles is missing.
    """
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    if "AWS_ACCESS_KEY_ID" in os.environ or not ("AWS_PROFILE" in os.environ or file.exists()):
        return {}
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise WorkspaceError(
            f"the credentials for S3 are in a profile ({file}), and boto3, which reads profiles, is not installed. "
            "Run `pip install boto3`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        ) from error
    return {"credential_provider": Boto3CredentialProvider()}


@contextmanager
def _explained(place: ObjectPlace) -> Iterator[None]:
    """Turns the errors of the library into one that names place and cure.

    Raises:
        WorkspaceError: the bucket is not there, refuses, or cannot be reached.
    """
    where = f"{place.uri} cannot be used: "
    at = f"at {place.endpoint}" if place.endpoint else f"on {SCHEMES[place.scheme]}"
    try:
        yield
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise WorkspaceError(
            f"{where}bucket {place.bucket!r} {at} refuses this job. Check the credentials in the environment, and what "
            f"they may do: read, write, list and delete. The server says: {_first_line(error)}"
        ) from error
    except (FileNotFoundError, BaseError) as error:
        if "NoSuchBucket" in str(error) or "The specified bucket does not exist" in str(error):
            raise WorkspaceError(
                f"{where}there is no bucket {place.bucket!r} {at}. Create it, or correct the name."
            ) from error
        if isinstance(error, FileNotFoundError):
            raise
        if any(role in str(error) for role in ROLES):
            raise WorkspaceError(
                f"{where}host {socket.gethostname()} has no credentials for bucket {place.bucket!r} {at}: not in the "
                "environment, and no role. Set them on every node before `ray start`."
            ) from error
        raise WorkspaceError(
            f"{where}{at} no request succeeds: {_first_line(error)}. Check address, region and network."
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


# ----------------------------------------------------------------------------- one object


def read(place: ObjectPlace) -> bytes | None:
    """The bytes of an object; None when it does not exist."""
    with _explained(place):
        try:
            return bytes(obstore.get(place.store(), place.key).bytes())
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise
            return None


def write(place: ObjectPlace, data: bytes, *, patient: bool = True) -> None:
    """
    Args:
        patient: try again for minutes where the server does not answer.
    """
    with _explained(place):
        obstore.put(place.store(patient=patient), place.key, data, use_multipart=False)


def create(place: ObjectPlace, data: bytes) -> bool:
    """Writes the object only if it does not exist. False if it does.

    The data must be of this caller alone: a request whose answer was lost is repeated, and then finds its own object.
    """
    with _explained(place):
        try:
            obstore.put(place.store(), place.key, data, mode="create")
        except AlreadyExistsError:
            return read(place) == data
        return True


def replace(place: ObjectPlace, data: bytes, *, expected: bytes) -> bool:
    """Writes the object only if it holds `expected`. False if it holds something else by then, or is gone."""
    with _explained(place):
        try:
            current = obstore.get(place.store(), place.key)
            version: UpdateVersion = {}
            if current.meta["e_tag"] is not None:
                version["e_tag"] = current.meta["e_tag"]
            if current.meta["version"] is not None:
                version["version"] = current.meta["version"]
            if bytes(current.bytes()) != expected:
                return False
            obstore.put(place.store(), place.key, data, mode=version)
        except PreconditionError:
            return read(place) == data
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise
            return False
        return True


def write_pieces(place: ObjectPlace, pieces: Iterable[memoryview], *, num_bytes: int) -> None:
    """Uploads by parts what the iterator yields, in order; in memory are the parts that travel."""
    with _explained(place):
        obstore.put(
            place.store(),
            place.key,
            iter(pieces),
            chunk_size=part_bytes(num_bytes),
            max_concurrency=PARTS_AT_ONCE,
        )


def part_bytes(num_bytes: int) -> int:
    """The size of a part of an object, such that there are not too many."""
    return max(PART_BYTES, -(-num_bytes // MOST_PARTS))


def delete(place: ObjectPlace) -> None:
    """Removes one object; it may be missing."""
    with _explained(place):
        obstore.delete(place.store(), [place.key])


# ----------------------------------------------------------------------------- what lies below a place


def upload(directory: str, place: ObjectPlace) -> None:
    """Copies the files below a local directory, read part by part."""
    for root, _, files in os.walk(directory):
        for name in files:
            path = Path(root, name)
            key = "/".join(part for part in (place.key, *path.relative_to(directory).parts) if part)
            with _explained(place):
                obstore.put(
                    place.store(),
                    key,
                    path,
                    chunk_size=part_bytes(path.stat().st_size),
                    max_concurrency=PARTS_AT_ONCE,
                )


def download(place: ObjectPlace, directory: str) -> None:
    """Copies the objects below a place into a local directory, many parts at once."""
    with ThreadPoolExecutor(PARTS_AT_ONCE) as threads, _explained(place):
        for entry in list_objects(place):
            path = Path(directory, entry.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                file.truncate(entry.num_bytes)
                fetch = partial(_fetch_part, place.store(), entry, file.fileno())
                for _ in threads.map(fetch, range(0, entry.num_bytes, PART_BYTES)):
                    pass  # raises what went wrong


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An object below a place."""

    key: str
    name: str
    """Its key below the place."""
    num_bytes: int


def _fetch_part(store: Store, entry: Entry, descriptor: int, start: int) -> None:
    part = obstore.get_range(store, entry.key, start=start, end=min(start + PART_BYTES, entry.num_bytes))
    view, at = memoryview(part), start
    while view:
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written


def list_objects(place: ObjectPlace) -> list[Entry]:
    """All objects below a place."""
    with _explained(place):
        found = [meta for page in obstore.list(place.store(), place.key or None) for meta in page]
    start = len(place.key) + 1 if place.key else 0
    return [Entry(key=meta["path"], name=meta["path"][start:], num_bytes=meta["size"]) for meta in found]


def list_directories(place: ObjectPlace) -> list[str]:
    """Names directly below a place that have something below them, sorted."""
    with _explained(place):
        found = obstore.list_with_delimiter(place.store(), place.key or None)
    return sorted(prefix.rpartition("/")[2] for prefix in found["common_prefixes"])


def delete_below(place: ObjectPlace) -> None:
    """Removes everything below a place."""
    keys = [entry.key for entry in list_objects(place)]
    if keys:
        with _explained(place):
            obstore.delete(place.store(), keys)
