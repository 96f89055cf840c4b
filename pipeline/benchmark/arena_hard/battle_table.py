"""Battles as arrays, and the bootstrap over their questions and games."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.benchmark.arena_hard.battles import Battle
from pipeline.errors import DataError
from pipeline.records import Metrics

Floats = NDArray[np.float64]


class BattleTable:
    """R battles as arrays; the baseline is model 0."""

    def __init__(self, battles: Sequence[Battle], baseline: str) -> None:
        players = {model for battle in battles for model in (battle.model_a, battle.model_b)}
        connected = _connected_models(baseline, battles)
        if not battles or players - connected:
            raise DataError(
                f"{len(battles)} battles do not compare {', '.join(sorted(players - connected)) or 'any model'} with "
                f"the baseline {baseline!r}. Give the baseline that the judge saw, and judgments with verdicts."
            )
        if players == {baseline}:
            raise DataError(
                f"all {len(battles)} battles compare the baseline {baseline!r} with itself, so there is no win rate. "
                "Give judgments of another model."
            )
        self.models = [baseline, *sorted(players - {baseline})]
        number = {model: n for n, model in enumerate(self.models)}
        self.a = np.array([number[battle.model_a] for battle in battles])
        self.b = np.array([number[battle.model_b] for battle in battles])
        self.outcomes = np.array([battle.outcome for battle in battles], dtype=np.float64)
        self.weights = np.array([battle.weight for battle in battles], dtype=np.float64)
        self.questions = np.unique([battle.question_id for battle in battles], return_inverse=True)[1]

    def with_intervals(self, rates: Callable[[Floats], Floats], seed: int, num_resamples: int) -> dict[str, Metrics]:
        """The rates of all battles and their two 95% bootstrap intervals, for every model but the baseline."""
        rng = np.random.default_rng(seed)
        by_question = [rates(self._resampled_questions(rng)) for _ in range(num_resamples)]
        by_battle = [rates(self._resampled_battles(rng)) for _ in range(num_resamples)]
        columns = {
            "win_rate": rates(self.weights),
            **dict(zip(("low", "high"), np.percentile(by_question, (2.5, 97.5), axis=0), strict=True)),
            **dict(zip(("upstream_low", "upstream_high"), np.percentile(by_battle, (2.5, 97.5), axis=0), strict=True)),
        }
        return {
            model: {key: float(column[n]) for key, column in columns.items()}
            for n, model in enumerate(self.models)
            if n > 0
        }

    def _resampled_questions(self, rng: np.random.Generator) -> Floats:
        num_questions = self.questions.max() + 1
        counts = rng.multinomial(num_questions, np.full(num_questions, 1 / num_questions))
        return self.weights * counts[self.questions]

    def _resampled_battles(self, rng: np.random.Generator) -> Floats:
        total = self.weights.sum()
        return rng.multinomial(int(total), self.weights / total).astype(np.float64)


def _connected_models(baseline: str, battles: Sequence[Battle]) -> set[str]:
    """The baseline, and the models that a chain of battles connects with it."""
    edges = {frozenset((battle.model_a, battle.model_b)) for battle in battles}
    connected = {baseline}
    while neighbours := {model for edge in edges if edge & connected for model in edge} - connected:
        connected |= neighbours
    return connected
