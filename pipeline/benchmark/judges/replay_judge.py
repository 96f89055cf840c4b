"""A file of judgments as a judge: repeats a benchmark without sending any request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.benchmark.judges.judge import JudgeRequest, Judgment, RecordOutcome, Unanswered
from pipeline.benchmark.judges.judgment_cache import read_judgment_rows
from pipeline.errors import DataError


class ReplayJudge:
    """Answers each request with the judgment that the file holds for the same messages."""

    def __init__(self, path: Path) -> None:
        """Reads a file as `JudgmentCache` writes it.

        Raises:
            DataError: the file cannot be read, holds judgments of several models, or judges the same messages twice.
        """
        try:
            rows = read_judgment_rows(path.read_bytes(), place=str(path))
            models = {row["model"] for row, _ in rows}
            self._judgments: dict[tuple[tuple[str, str], ...], Judgment] = {}
            for number, (row, judgment) in enumerate(rows, start=1):
                key = _message_key(row["messages"])
                if self._judgments.setdefault(key, judgment).text != judgment.text:
                    raise DataError(f"{path}, line {number}: a second, different judgment of the same messages")
        except (OSError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} cannot be replayed: {error!r}. Give the --cache file of an earlier run."
            ) from error
        if len(models) != 1:
            raise DataError(f"{path} holds judgments of {len(models)} models ({sorted(models)}); replay one at a time")
        self.name = f"replay:{path}"
        self.model: str = models.pop()

    def judge(self, requests: Sequence[JudgeRequest], record: RecordOutcome) -> None:
        for i, request in enumerate(requests):
            record(i, self._judgments.get(_message_key(request.messages), Unanswered(reason="not in the replay file")))


def _message_key(messages: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"]) for message in messages)
