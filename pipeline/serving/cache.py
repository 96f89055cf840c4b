"""A cache of scores: people and evaluation scripts often send the same response twice."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence

from pipeline.records import Message, RewardScore


def row_key(prompt: Sequence[Message], response: str) -> bytes:
    """The identity of a (prompt, response): SHA-256 over the role and the text of every turn, in order."""
    turns = [[message["role"], message["content"]] for message in prompt]
    return hashlib.sha256(json.dumps([turns, response]).encode()).digest()


class ScoreCache:
    """Keeps the most recently used scores. It keeps no texts, so an entry is small: about 1 KB at four objectives."""

    def __init__(self, max_entries: int) -> None:
        self.hits = 0
        self.misses = 0
        self._max_entries = max_entries
        self._scores: OrderedDict[bytes, RewardScore] = OrderedDict()

    def get(self, key: bytes) -> RewardScore | None:
        score = self._scores.get(key)
        if score is None:
            self.misses += 1
            return None
        self.hits += 1
        self._scores.move_to_end(key)
        return score

    def put(self, key: bytes, score: RewardScore) -> None:
        self._scores[key] = score
        self._scores.move_to_end(key)
        while len(self._scores) > self._max_entries:
            self._scores.popitem(last=False)

    def __len__(self) -> int:
        return len(self._scores)
