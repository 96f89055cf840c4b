"""Rewards that need no model: rules about the text of a response."""

from __future__ import annotations

import re
from typing import Any

from pipeline.config.rewards import ExactMatch, FormatReward, LengthReward, RegexMatch
from pipeline.rewards.rows import RewardRows, SourceScore, plain_score


class ExactMatchReward:
    """1 where the response is the text of a column, apart from space at both ends."""

    def __init__(self, config: ExactMatch) -> None:
        self._config = config

    def score(self, rows: RewardRows) -> list[SourceScore]:
        expected = [row[self._config.column] for row in rows.columns]
        pairs = zip(rows.responses, expected, strict=True)
        return [plain_score(float(self._plain(response) == self._plain(answer))) for response, answer in pairs]

    def _plain(self, value: Any) -> str:
        text = text_after(str(value), self._config.after).strip()
        return text.casefold() if self._config.ignore_case else text


class RegexReward:
    """1 where a pattern is found in the response; with a column, where its last match holds the column's text."""

    def __init__(self, config: RegexMatch) -> None:
        self._pattern = re.compile(config.pattern, re.DOTALL)
        self._column = config.column

    def score(self, rows: RewardRows) -> list[SourceScore]:
        return [plain_score(float(self._holds(*row))) for row in zip(rows.responses, rows.columns, strict=True)]

    def _holds(self, response: str, columns: Any) -> bool:
        matches = list(self._pattern.finditer(response))
        if self._column is None or not matches:
            return bool(matches)
        return (matches[-1][1] or "").strip() == str(columns[self._column]).strip()


class LengthRule:
    """Minus the relative distance from a target, or above a limit."""

    def __init__(self, config: LengthReward) -> None:
        self._config = config

    def score(self, rows: RewardRows) -> list[SourceScore]:
        words = self._config.unit == "words"
        lengths = [len(text.split()) for text in rows.responses] if words else rows.num_tokens
        return [plain_score(self._of(length)) for length in lengths]

    def _of(self, length: int) -> float:
        if self._config.target is not None:
            return -abs(length - self._config.target) / self._config.target
        limit = self._config.at_most or 1
        return -max(0, length - limit) / limit


class FormatRule:
    """1 where every part occurs once and in order."""

    def __init__(self, config: FormatReward) -> None:
        self._parts = config.parts

    def score(self, rows: RewardRows) -> list[SourceScore]:
        return [plain_score(float(self._is_kept(text))) for text in rows.responses]

    def _is_kept(self, text: str) -> bool:
        places = [text.find(part) for part in self._parts]
        return all(text.count(part) == 1 for part in self._parts) and places == sorted(places)


def text_after(text: str, marker: str | None) -> str:
    """What follows the last occurrence of the marker; the whole text where it does not occur."""
    return text if marker is None else text.rpartition(marker)[2]
