"""One question of a benchmark, and the question with a model's answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BenchmarkQuestion:
    """One question: a conversation whose user turns are given."""

    id: int | str
    turns: tuple[str, ...]
    temperature: float
    group: str
    """AlpacaEval's `dataset`; the category in the other benchmarks."""
    place: str
    """File and line of the question, for error messages."""


@dataclass(frozen=True, kw_only=True)
class AnsweredQuestion:
    """A question with the model's answer to each turn."""

    question: BenchmarkQuestion
    outputs: tuple[str, ...]
