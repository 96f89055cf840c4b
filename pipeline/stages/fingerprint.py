"""The identity of a stage's result: what it was computed from, and what it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def fingerprint(name: str, version: int, config: Mapping[str, Any], inputs: Sequence[str]) -> str:
    """SHA-256 over a stage's name, code version, canonical JSON of its configuration, and inputs' fingerprints.

    Where the stage runs does not count: rescaling workers never invalidates a result.

    Args:
        name: name of the stage.
        version: increased by hand when a change of the stage's code changes its result.
        config: JSON-able slice of the recipe that the stage reads.
        inputs: fingerprints of earlier stages and of data files, in order.
    """
    identity = {"name": name, "version": version, "config": config, "inputs": list(inputs)}
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def directory_fingerprint(directory: str) -> str:
    """SHA-256 over the names and contents of all files below a directory; the directory's own path does not count."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(directory).rglob("*") if path.is_file()):
        with path.open("rb") as stream:
            contents = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{contents}  {path.relative_to(directory).as_posix()}\n".encode())
    return digest.hexdigest()
