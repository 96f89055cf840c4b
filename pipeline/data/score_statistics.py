"""Per-objective statistics of annotated scores (docs/method.md section 5)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from pipeline.errors import DataError
from pipeline.records import PreferencePair

SMALLEST_STD = 1e-6
LEAST_SCORES = 30
"""Scores of an objective below which their scale is not checked: too few to estimate it."""
SAME_SCALE = 3.0
"""Saved standard deviations by which a mean, and the factor by which a spread, may differ between samples of one
scale. From 0-4 to 1-10 or 0-100 is farther."""


@dataclass(frozen=True, kw_only=True)
class ScoreStatistics:
    """Mean and population standard deviation of each objective over the annotated training responses of one source."""

    objectives: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: tuple[int, ...]
    """Annotated responses per objective; a missing score counts nowhere."""

    @property
    def has_scores(self) -> bool:
        """Whether anything was annotated."""
        return any(self.count)

    @classmethod
    def of(cls, pairs: Iterable[PreferencePair], objectives: Sequence[str]) -> ScoreStatistics:
        """One pass over both responses of every pair (Welford 1962). Give it the training split only."""
        count = [0] * len(objectives)
        mean = [0.0] * len(objectives)
        sum_of_squares = [0.0] * len(objectives)
        for pair in pairs:
            for scores in (pair.scores_chosen, pair.scores_rejected):
                for k, objective in enumerate(objectives):
                    if scores is None or objective not in scores:
                        continue
                    count[k] += 1
                    delta = scores[objective] - mean[k]
                    mean[k] += delta / count[k]
                    sum_of_squares[k] += delta * (scores[objective] - mean[k])
        std = [math.sqrt(m2 / n) if n else 0.0 for m2, n in zip(sum_of_squares, count, strict=True)]
        return cls(
            objectives=tuple(objectives),
            mean=tuple(mean),
            std=tuple(s if s > SMALLEST_STD else 1.0 for s in std),
            count=tuple(count),
        )

    def require_scale_of(self, mean: Sequence[float], std: Sequence[float], *, place: str) -> None:
        """Raises unless these scores look as if they were given on the scale of saved statistics.

        Args:
            mean, std: [K] saved with a model; empty for a model that was trained without scores.
            place: where the scores of `self` come from, for the error message.

        Raises:
            DataError: an objective's mean or spread is far from the saved one.
        """
        for k, (saved_mean, saved_std) in enumerate(zip(mean, std, strict=True)):
            if self.count[k] < LEAST_SCORES:
                continue
            ratio = self.std[k] / saved_std
            if abs(self.mean[k] - saved_mean) > SAME_SCALE * saved_std or not 1 / SAME_SCALE < ratio < SAME_SCALE:
                raise DataError(
                    f"{place}: the scores of {self.objectives[k]!r} have mean {self.mean[k]:.3g} and standard "
                    f"deviation {self.std[k]:.3g}, but the model was trained on scores with mean {saved_mean:.3g} and "
                    f"standard deviation {saved_std:.3g}. They are on another scale, or of another objective: "
                    "rescale them, or give the data of this model."
                )

    def completed_by(self, other: ScoreStatistics) -> ScoreStatistics:
        """These statistics, and those of `other` for objectives without annotations here. `count` stays as it is."""
        mine = [count > 0 for count in self.count]
        return replace(
            self,
            mean=tuple(a if keep else b for keep, a, b in zip(mine, self.mean, other.mean, strict=True)),
            std=tuple(a if keep else b for keep, a, b in zip(mine, self.std, other.std, strict=True)),
        )


@dataclass(frozen=True, kw_only=True)
class MixtureStatistics:
    """The statistics of every source: two annotators' scales do not mix."""

    sources: Mapping[str, ScoreStatistics]
    """Source -> its statistics; at least one."""

    @classmethod
    def of(
        cls, pairs: Sequence[PreferencePair], objectives: Sequence[str], *, heldout: Sequence[PreferencePair] = ()
    ) -> MixtureStatistics:
        """
        Args:
            pairs: the training split.
            heldout: pairs to standardise as well. They decide only where a source has no annotated training response.
        """
        names = dict.fromkeys(pair.source for pair in (*pairs, *heldout))
        return cls(
            sources={
                name: ScoreStatistics.of((p for p in pairs if p.source == name), objectives).completed_by(
                    ScoreStatistics.of((p for p in heldout if p.source == name), objectives)
                )
                for name in names
            }
        )

    @property
    def objectives(self) -> tuple[str, ...]:
        return next(iter(self.sources.values())).objectives

    @property
    def has_scores(self) -> bool:
        """Whether any training response was annotated."""
        return any(source.has_scores for source in self.sources.values())

    def named(self, objectives: tuple[str, ...]) -> MixtureStatistics:
        """The same statistics of objectives with other names."""
        return MixtureStatistics(
            sources={name: replace(source, objectives=objectives) for name, source in self.sources.items()}
        )

    @property
    def scale_sources(self) -> tuple[str, ...]:
        """[K] for each objective the source with most annotations: its scale is the one that a person is shown."""
        return tuple(
            max(self.sources, key=lambda name: self.sources[name].count[k]) for k in range(len(self.objectives))
        )

    @property
    def mean(self) -> tuple[float, ...]:
        """[K] on the scale of `scale_sources`."""
        return tuple(self.sources[name].mean[k] for k, name in enumerate(self.scale_sources))

    @property
    def std(self) -> tuple[float, ...]:
        """[K] on the scale of `scale_sources`."""
        return tuple(self.sources[name].std[k] for k, name in enumerate(self.scale_sources))

    def standardise(
        self, scores: Sequence[Mapping[str, float] | None], sources: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardises each row by the statistics of its own source: s_hat = (s - mean) / std, 0 where missing.

        Args:
            scores: [B] annotated scores of one response a row.
            sources: [B] its source.

        Returns:
            s_hat [B, K] float32 and mask [B, K] bool.
        """
        values = torch.zeros(len(scores), len(self.objectives))
        mask = torch.zeros(len(scores), len(self.objectives), dtype=torch.bool)
        for b, (row, source) in enumerate(zip(scores, sources, strict=True)):
            for k, objective in enumerate(self.objectives):
                if row is not None and objective in row:
                    of_source = self.sources[source]
                    values[b, k] = (row[objective] - of_source.mean[k]) / of_source.std[k]
                    mask[b, k] = True
        return values, mask


def constant_scores(pairs: Iterable[PreferencePair]) -> dict[tuple[str, str], float]:
    """(source, objective) -> its score, where several responses have one and all of them the same one.

    Standardised, such a score is 0 for every response: it tells no response from another.
    """
    seen: dict[tuple[str, str], tuple[float, float, int]] = {}
    for pair in pairs:
        for scores in (pair.scores_chosen, pair.scores_rejected):
            for objective, score in (scores or {}).items():
                lowest, highest, count = seen.get((pair.source, objective), (score, score, 0))
                seen[pair.source, objective] = min(lowest, score), max(highest, score), count + 1
    return {key: low for key, (low, high, count) in seen.items() if count > 1 and high - low <= SMALLEST_STD}
