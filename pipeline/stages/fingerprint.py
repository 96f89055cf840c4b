"""The identity of a stage's result: what it was computed from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any


def fingerprint(name: str, version: int, config: Mapping[str, Any], inputs: Sequence[str]) -> str:
    """SHA-256 over a stage's name, code version, canonical JSON of its configuration, and inputs' fingerprints.

    Where the stage runs is no part of it: rescaling workers never invalidates a result.

    Args:
        name: of the stage.
        version: raised by hand whenever the stage's code computes something else.
        config: JSON-able slice of the recipe that the stage reads.
        inputs: fingerprints of earlier stages and of data files, in order.
    """
    identity = {"name": name, "version": version, "config": config, "inputs": list(inputs)}
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
