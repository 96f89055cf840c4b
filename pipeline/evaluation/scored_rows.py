"""Scored rows as columns without texts: about seventy bytes per pair, all that an aggregation needs."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from pipeline.errors import DataError
from pipeline.evaluation.rewardbench import TIES, ties_number

KEY_DIGITS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardedResponse:
    """Reward and length of one response."""

    reward: float
    characters: int
    """Length of the scored text in characters, which unlike tokens do not depend on the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredComparison:
    """One row: the rewards of its responses, and its keys."""

    id: str
    subset: str
    source: str
    content_key: int
    prompt_key: int
    cut: bool
    """A prompt or a response exceeds the model's length, so the model did not read all of it."""
    annotators_tie: bool
    chosen: tuple[RewardedResponse, ...]
    rejected: tuple[RewardedResponse, ...]
    margin_std: float
    """Posterior standard deviation of the first chosen minus the first rejected reward."""
    log_odds: float
    """Calibrated log-odds that the first chosen response is better than the first rejected one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredRows:
    """N rows with R responses in total."""

    rewards: np.ndarray
    """[R] float64, row after row; in each row, the chosen responses come first."""
    characters: np.ndarray
    """[R], see `RewardedResponse`."""
    num_chosen: np.ndarray
    """[N]"""
    num_responses: np.ndarray
    """[N], chosen and rejected responses together."""
    margin_std: np.ndarray
    """[N] float64. For this and the following columns see `ScoredComparison`."""
    log_odds: np.ndarray
    """[N] float64."""
    subset: np.ndarray
    """[N] index into `subset_names`."""
    subset_names: tuple[str, ...]
    """The names of the subsets, sorted."""
    sources: tuple[str, ...]
    """[N] name of the source of each row."""
    content_key: np.ndarray
    """[N] uint64"""
    prompt_key: np.ndarray
    """[N] uint64"""
    cut: np.ndarray
    """[N] bool"""
    annotators_tie: np.ndarray
    """[N] bool"""
    ties_ids: dict[int, str]
    """Row -> id, for the rows of RewardBench 2's Ties, whose ids pair them."""

    @staticmethod
    def of(rows: Iterable[ScoredComparison]) -> ScoredRows:
        """Consumes `rows` with one row in memory at a time."""
        rewards, margin_std, log_odds = array("d"), array("d"), array("d")
        characters, num_chosen, num_responses, subset = array("i"), array("i"), array("i"), array("i")
        content_key, prompt_key = array("Q"), array("Q")
        cut, annotators_tie = array("b"), array("b")
        numbers: dict[str, int] = {}
        sources: list[str] = []
        ties_ids = {}
        for n, row in enumerate(rows):
            responses = (*row.chosen, *row.rejected)
            rewards.extend(response.reward for response in responses)
            characters.extend(response.characters for response in responses)
            num_chosen.append(len(row.chosen))
            num_responses.append(len(responses))
            margin_std.append(row.margin_std)
            log_odds.append(row.log_odds)
            subset.append(numbers.setdefault(row.subset, len(numbers)))
            sources.append(sys.intern(row.source))
            content_key.append(row.content_key)
            prompt_key.append(row.prompt_key)
            cut.append(row.cut)
            annotators_tie.append(row.annotators_tie)
            if row.subset == TIES and ties_number(row.id) is not None:
                ties_ids[n] = row.id
        names = sorted(numbers)
        place = np.array([names.index(name) for name in numbers], dtype=np.int32)
        return ScoredRows(
            rewards=np.asarray(rewards),
            characters=np.asarray(characters),
            num_chosen=np.asarray(num_chosen),
            num_responses=np.asarray(num_responses),
            margin_std=np.asarray(margin_std),
            log_odds=np.asarray(log_odds),
            subset=place[np.asarray(subset)],
            subset_names=tuple(names),
            sources=tuple(sources),
            content_key=np.asarray(content_key),
            prompt_key=np.asarray(prompt_key),
            cut=np.asarray(cut).astype(bool),
            annotators_tie=np.asarray(annotators_tie).astype(bool),
            ties_ids=ties_ids,
        )

    def __len__(self) -> int:
        return len(self.num_chosen)

    @property
    def first(self) -> np.ndarray:
        """[N] position of the first response of each row, a chosen one."""
        return self.num_responses.cumsum(dtype=np.int64) - self.num_responses

    @property
    def first_rejected(self) -> np.ndarray:
        """[N] position of the first rejected response of each row."""
        return self.first + self.num_chosen

    @property
    def are_pairs(self) -> bool:
        return bool((self.num_responses == 2).all() and (self.num_chosen == 1).all())

    def scored_as(self, others: ScoredRows) -> ScoredRows:
        """These rows with the rewards of `others`: the same rows, scored by another model."""
        return replace(self, rewards=others.rewards, margin_std=others.margin_std, log_odds=others.log_odds)

    def scored_by_length(self) -> ScoredRows:
        """These rows with the length in characters as the reward."""
        return replace(self, rewards=self.characters.astype(np.float64))

    def in_order_of(self, content_key: np.ndarray, *, place: str) -> ScoredRows:
        """The row of every key, in the order of the keys.

        Raises:
            DataError: these rows, read from `place`, are not the rows of the keys.
        """
        order = self.content_key.argsort()
        found = order[np.searchsorted(self.content_key, content_key, sorter=order).clip(max=len(order) - 1)]
        missing = int((self.content_key[found] != content_key).sum())
        if missing or len(content_key) != len(self):
            raise DataError(
                f"{place} has {len(self)} rows and this evaluation {len(content_key)}, of which {missing} are not in "
                "it. Two models are compared on the same rows: evaluate both on the same files."
            )
        return self._take(found)

    def _take(self, rows: np.ndarray) -> ScoredRows:
        sizes = self.num_responses[rows]
        # Start of each row's responses in this table, minus their start in the result.
        responses = np.repeat(self.first[rows] - (sizes.cumsum(dtype=np.int64) - sizes), sizes) + np.arange(sizes.sum())
        return replace(
            self,
            rewards=self.rewards[responses],
            characters=self.characters[responses],
            num_chosen=self.num_chosen[rows],
            num_responses=sizes,
            margin_std=self.margin_std[rows],
            log_odds=self.log_odds[rows],
            subset=self.subset[rows],
            sources=tuple(self.sources[row] for row in rows),
            content_key=self.content_key[rows],
            prompt_key=self.prompt_key[rows],
            cut=self.cut[rows],
            annotators_tie=self.annotators_tie[rows],
            ties_ids={n: self.ties_ids[int(row)] for n, row in enumerate(rows) if int(row) in self.ties_ids},
        )


def key_number(key: str) -> int:
    """The 64 bits of a content or prompt key, which is a hash in hexadecimal.

    Raises:
        ValueError: the key is not such a hash.
    """
    if len(key) != KEY_DIGITS:
        raise ValueError(f"{key!r} has not {KEY_DIGITS} digits")
    return int(key, 16)


def key_column(keys: Iterable[str]) -> np.ndarray:
    """[N] uint64; eight bytes per key, because `keys` is not collected as text."""
    return np.asarray(array("Q", map(key_number, keys)))
