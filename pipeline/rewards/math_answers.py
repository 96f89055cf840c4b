"""Whether a response ends with the expected expression: `math-verify`, called like a user's function."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from pipeline.errors import ConfigError
from pipeline.rewards.built_in import text_after

LIBRARY = "math_verify"
EXPRESSION_S = 5
"""Seconds that one expression may take, where the library can stop it: in the main thread."""


def require_math_verify() -> None:
    """Raises ConfigError where the library is not installed."""
    if find_spec(LIBRARY) is None:
        raise ConfigError(
            "alignment.rewards: `math` needs the package math-verify, which is not installed. Install it with "
            "pip install 'vrm-pipeline[math]'."
        )


@dataclass(frozen=True)
class MathAnswers:
    """1.0 where the last expression of the response equals that of the column, else 0.0."""

    column: str
    after: str | None

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str], columns: dict[str, list[Any]]) -> list[float]:
        from math_verify import parse, verify

        # Without its alarm the library warns at every call; the deadline of the batch is then the only one.
        logging.getLogger(LIBRARY).setLevel(logging.ERROR)
        limit_s = EXPRESSION_S if threading.current_thread() is threading.main_thread() else None
        scores = []
        for response, answer in zip(responses, columns[self.column], strict=True):
            expected = parse(text_after(str(answer), self.after), parsing_timeout=limit_s)
            found = parse(response, parsing_timeout=limit_s)
            scores.append(float(verify(expected, found, timeout_seconds=limit_s)))
        return scores
