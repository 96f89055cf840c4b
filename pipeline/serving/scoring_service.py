"""Between HTTP and the model: the questions people ask of a reward, answered from scores."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.cluster import ScoringConfig
from pipeline.errors import DataError, DeadlineExceeded, NumericsError
from pipeline.models.reward_model import RewardModelCard
from pipeline.objectives.reward_comparison import compare_rewards, rank_by_lower_bound
from pipeline.records import Message, RewardScore
from pipeline.serving.admission import Admission
from pipeline.serving.cache import ScoreCache, row_key
from pipeline.serving.protocol import (
    MAX_TEXT_CHARS,
    BestOfAnswer,
    BestOfRequest,
    Candidate,
    CompareAnswer,
    CompareRequest,
    Limits,
    ModelAnswer,
    ObjectiveStatistics,
    ScoreAnswer,
    ScoredResponse,
    ScoreManyAnswer,
    ScoreManyRequest,
    ScoreRequest,
    as_messages,
)

Row = tuple[tuple[Message, ...], str]
"""A prompt and its response."""

Rows = tuple[list[tuple[Message, ...]], list[str]]
"""Prompts and their responses, as many of one as of the other."""


@dataclass
class Counts:
    """Finite scores since the replica started; sums, so that a monitor can take rates and means."""

    rows: int = 0
    reward_sum: float = 0.0
    reward_std_sum: float = 0.0

    def add(self, score: RewardScore) -> None:
        self.rows += 1
        self.reward_sum += score.mean
        self.reward_std_sum += score.std


class ScoringService:
    """Answers the requests of the protocol with one model."""

    def __init__(
        self,
        score_rows: Callable[[Rows], Awaitable[list[RewardScore]]],
        model: ModelAnswer,
        *,
        admission: Admission,
        cache: ScoreCache,
        deadline_s: float,
    ) -> None:
        self.model = model
        self.admission = admission
        self.cache = cache
        self.counts = Counts()
        self._score_rows = score_rows
        self._deadline_s = deadline_s

    async def score(self, request: ScoreRequest) -> ScoreAnswer:
        scores = await self.scores([(as_messages(request.prompt), response) for response in request.responses])
        return ScoreAnswer(model_fingerprint=self.fingerprint, scores=[self._scored(score) for score in scores])

    async def score_many(self, request: ScoreManyRequest) -> ScoreManyAnswer:
        scores = await self.scores(
            [(as_messages(item.prompt), response) for item in request.items for response in item.responses]
        )
        left = iter(scores)
        items = [[self._scored(next(left)) for _ in item.responses] for item in request.items]
        return ScoreManyAnswer(model_fingerprint=self.fingerprint, items=items)

    async def compare(self, request: CompareRequest) -> CompareAnswer:
        prompt = as_messages(request.prompt)
        a, b = await self.scores([(prompt, request.a), (prompt, request.b)])
        result = compare_rewards(a, b)
        return CompareAnswer(
            model_fingerprint=self.fingerprint,
            probability=result.probability,
            preferred="tie" if result.margin == 0.0 else "a" if result.margin > 0.0 else "b",
            margin=result.margin,
            margin_std=result.margin_std,
            contributions=dict(zip(self.model.objectives, result.contributions, strict=False)),
            decided_by=None if result.deciding is None else self.model.objectives[result.deciding],
            a=self._scored(a),
            b=self._scored(b),
        )

    async def best_of(self, request: BestOfRequest) -> BestOfAnswer:
        prompt = as_messages(request.prompt)
        scores = await self.scores([(prompt, response) for response in request.responses])
        ranking = [
            Candidate(index=i, bound=bound, **self._scored(scores[i]).model_dump())
            for i, bound in rank_by_lower_bound(scores, lcb=request.lcb)
        ]
        return BestOfAnswer(model_fingerprint=self.fingerprint, best=ranking[0].index, ranking=ranking)

    async def scores(self, rows: Sequence[Row]) -> list[RewardScore]:
        """One score per row, in order; a row that occurs twice, or was scored before, costs nothing again.

        Raises:
            DataError: a conversation that the chat template refuses, or too many rows.
            Overloaded: the replica is full.
            DeadlineExceeded: they were not scored in time.
            NumericsError: a reward that is not finite.
        """
        if len(rows) > self.model.limits.max_rows:
            raise DataError(
                f"{len(rows)} responses in one request, at most {self.model.limits.max_rows} are taken. "
                "Split it, or raise cluster.scoring.max_rows_per_request."
            )
        keys = [row_key(*row) for row in rows]
        known = {key: self.cache.get(key) for key in dict.fromkeys(keys)}
        new = {key: row for key, row in zip(keys, rows, strict=True) if known[key] is None}
        if new:
            try:
                async with asyncio.timeout(self._deadline_s):
                    with self.admission.admit(len(new)):
                        scores = await self._score_rows(_transposed(list(new.values())))
            except TimeoutError as error:
                raise DeadlineExceeded(
                    f"{len(new)} responses were not scored within {self._deadline_s:g} s. "
                    "Ask for fewer at once, or raise cluster.deadlines.score_s."
                ) from error
            for key, score in zip(new, scores, strict=True):
                if not (math.isfinite(score.mean) and math.isfinite(score.std)):
                    raise NumericsError(
                        f"the model gave a reward of {score.mean} with a standard deviation of {score.std}"
                    )
                self.counts.add(score)
                self.cache.put(key, score)
                known[key] = score
        return [found for key in keys if (found := known[key]) is not None]

    @property
    def fingerprint(self) -> str:
        return self.model.model_fingerprint

    def _scored(self, score: RewardScore) -> ScoredResponse:
        # A Bradley-Terry model gives no weights, a decoder that is a network no scores: those dicts are empty.
        names = self.model.objectives
        weights = dict(zip(names, score.objective_weights, strict=False))
        scores = dict(zip(names, score.objective_scores, strict=False))
        return ScoredResponse(
            reward=score.mean,
            reward_std=score.std,
            concentration=score.concentration,
            objective_weights=weights,
            objective_scores=scores,
            contributions={name: weights[name] * scores[name] for name in scores},
            deviations=list(score.deviations),
        )


def _transposed(rows: Sequence[Row]) -> Rows:
    return [prompt for prompt, _ in rows], [response for _, response in rows]


DECODERS = {"gate": "bilinear", "regression": "linear", "bt": "linear", "ensemble": "linear"}
"""Of the heads that have no choice of it."""


def describe(
    card: RewardModelCard, config: ScoringConfig, fingerprint: str, versions: Mapping[str, str]
) -> ModelAnswer:
    """What `GET /v1/model` says of a checkpoint."""
    statistics = zip(card.objectives, card.score_mean, card.score_std, strict=False)  # no annotations, no statistics
    return ModelAnswer(
        model_fingerprint=fingerprint,
        head=card.head,
        decoder=DECODERS.get(card.head, card.vrm.decoder),
        objectives=list(card.objectives),
        semantic_dims=card.vrm.semantic_dims if card.head == "vrm" else 0,
        max_length=card.max_length,
        reward_mean=card.reward_mean,
        reward_std=card.reward_std,
        objective_statistics={name: ObjectiveStatistics(mean=mean, std=std) for name, mean, std in statistics},
        metrics=dict(card.metrics),
        versions=dict(versions),
        limits=Limits(
            max_request_bytes=config.max_request_bytes,
            max_rows=config.max_rows_per_request,
            max_text_chars=MAX_TEXT_CHARS,
        ),
    )
