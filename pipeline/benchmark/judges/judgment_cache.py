"""Judgments on disk: one JSON object per line, appended as soon as the judge answers, never rewritten."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.benchmark.judges.judge import LARGEST_LOGPROB, Judge, JudgeRequest, Judgment
from pipeline.data.files import AppendedLines
from pipeline.errors import DataError


class JudgmentCache:
    """Implements `JudgmentStore` in a file; each line is {key, judge, model, messages, sampling, judgment}.

    Each judgment is written before the judge's next answer arrives, so a killed run loses none of them. The next start
    drops a line that the kill cut short.
    """

    def __init__(self, lines: AppendedLines, judgments: dict[str, Judgment]) -> None:
        self._lines = lines
        self._judgments = judgments

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[JudgmentCache]:
        """Reads the judgments of a file and opens it for appending; creates the file if it does not exist.

        Raises:
            WorkspaceLocked: another run appends to the file.
            DataError: a line is not a judgment.
        """
        with AppendedLines.open(path, option="--cache") as lines:
            rows = read_judgment_rows(lines.content, place=str(path))
            yield cls(lines, {row["key"]: judgment for row, judgment in rows if "key" in row})

    def get(self, key: str) -> Judgment | None:
        return self._judgments.get(key)

    def append(self, key: str, judge: Judge, request: JudgeRequest, judgment: Judgment) -> None:
        row = {
            "key": key,
            "judge": judge.name,
            "model": judge.model,
            "messages": [dict(message) for message in request.messages],
            "sampling": asdict(request.sampling),
            "judgment": asdict(judgment),
        }
        self._lines.append(row)
        self._judgments[key] = judgment


def read_judgment_rows(content: bytes, *, place: str) -> list[tuple[dict[str, Any], Judgment]]:
    """The rows of a cache, each with its judgment. Only the text of a judgment is required.

    Raises:
        DataError: a line is not such a row; names file and line.
    """
    rows = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            values = row["judgment"]
            judgment = Judgment(
                text=values["text"],
                first_token_logprobs=_logprobs(values.get("first_token_logprobs", {})),
                finish_reason=values.get("finish_reason", "stop"),
                prompt_tokens=values.get("prompt_tokens"),
                completion_tokens=values.get("completion_tokens"),
                time=values.get("time", 0.0),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{place}, line {number}: no judgment ({error!r}): {line[:60].decode(errors='replace')}. "
                'A row is {"judge": ..., "model": ..., "messages": [...], "judgment": {"text": ...}}.'
            ) from error
        rows.append((row, judgment))
    return rows


def _logprobs(values: dict[str, Any]) -> dict[str, float]:
    for token, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value <= LARGEST_LOGPROB:
            raise ValueError(f"{value!r:.40} is no log-probability of {token!r:.40}")
    return values
