"""The scoring service between HTTP and the model: answers the requests of the protocol from scores of one model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.cluster import ScoringConfig
from pipeline.errors import DataError, DeadlineExceeded, NumericsError
from pipeline.evaluation.reasons import reasons_of_model
from pipeline.models.reward_model_card import RewardModelCard
from pipeline.objectives.reward_comparison import rank_by_lower_bound
from pipeline.objectives.reweighting import Factors, factors_of
from pipeline.records import Message, RewardScore
from pipeline.serving.admission import Admission
from pipeline.serving.answers import compare_answer, explained_reward
from pipeline.serving.cache import ScoreCache, row_key
from pipeline.serving.protocol import (
    MAX_TEXT_CHARS,
    BestOfAnswer,
    BestOfRequest,
    CompareAnswer,
    CompareRequest,
    ModelDescription,
    ObjectiveStatistics,
    RankedResponse,
    RequestLimits,
    ScoreAnswer,
    ScoreManyAnswer,
    ScoreManyRequest,
    ScoreRequest,
    prompt_messages,
)

Row = tuple[tuple[Message, ...], str]
"""A prompt and its response."""

Rows = tuple[list[tuple[Message, ...]], list[str]]
"""The same as columns: prompts, and one response for each."""

RowFactors = Sequence[Factors | None]
"""Factors of each row's objective weights; None for the model's own."""


@dataclass
class Counts:
    """Counts and sums of the finite scores since the replica started, from which a monitor takes rates and means."""

    rows: int = 0
    reward_sum: float = 0.0
    reward_std_sum: float = 0.0

    def add(self, score: RewardScore) -> None:
        self.rows += 1
        self.reward_sum += score.mean
        self.reward_std_sum += score.std


class ScoringService:
    """Answers the requests of the protocol with one model.

    It runs on the event loop of its replica: between two awaits no other request runs, so nothing here needs a lock.
    """

    def __init__(
        self,
        score_rows: Callable[..., Awaitable[list[RewardScore]]],
        model: ModelDescription,
        *,
        admission: Admission,
        cache: ScoreCache,
        deadline_s: float,
    ) -> None:
        """
        Args:
            score_rows: scores `Rows`; with a second argument, `RowFactors`, by re-weighted objectives.
        """
        self.model = model
        self.admission = admission
        self.cache = cache
        self.counts = Counts()
        self._score_rows = score_rows
        self._deadline_s = deadline_s

    async def score(self, request: ScoreRequest) -> ScoreAnswer:
        rows = [(prompt_messages(request.prompt), response) for response in request.responses]
        scores = await self.scores(rows, [self._factors(request)] * len(rows))
        return ScoreAnswer(
            model_fingerprint=self.fingerprint, scores=[explained_reward(self.model, score) for score in scores]
        )

    async def score_many(self, request: ScoreManyRequest) -> ScoreManyAnswer:
        scores = await self.scores(
            [(prompt_messages(item.prompt), response) for item in request.items for response in item.responses],
            [self._factors(item) for item in request.items for _ in item.responses],
        )
        left = iter(scores)
        items = [[explained_reward(self.model, next(left)) for _ in item.responses] for item in request.items]
        return ScoreManyAnswer(model_fingerprint=self.fingerprint, items=items)

    async def compare(self, request: CompareRequest) -> CompareAnswer:
        prompt = prompt_messages(request.prompt)
        a, b = await self.scores([(prompt, request.a), (prompt, request.b)])
        return compare_answer(self.model, a, b)

    async def best_of(self, request: BestOfRequest) -> BestOfAnswer:
        prompt = prompt_messages(request.prompt)
        scores = await self.scores([(prompt, response) for response in request.responses])
        ranking = [
            RankedResponse(index=i, bound=bound, **explained_reward(self.model, scores[i]).model_dump())
            for i, bound in rank_by_lower_bound(scores, lcb=request.lcb)
        ]
        return BestOfAnswer(model_fingerprint=self.fingerprint, best=ranking[0].index, ranking=ranking)

    async def scores(self, rows: Sequence[Row], factors: RowFactors | None = None) -> list[RewardScore]:
        """One score per row, in order. A row that occurs twice, or is in the cache, is not scored again.

        Args:
            factors: of each row's objective weights; None for the model's own.

        Raises:
            DataError: the chat template refuses a conversation, or there are too many rows.
            Overloaded: the replica is full.
            DeadlineExceeded: the rows were not scored in time.
            NumericsError: a reward is not finite.
        """
        if len(rows) > self.model.limits.max_rows:
            raise DataError(
                f"{len(rows)} responses in one request, at most {self.model.limits.max_rows} are taken. "
                "Split it, or raise cluster.scoring.max_rows_per_request."
            )
        given = [None] * len(rows) if factors is None else factors
        keys = [row_key(*row) + repr(factor or "").encode() for row, factor in zip(rows, given, strict=True)]
        known = {key: self.cache.get(key) for key in dict.fromkeys(keys)}
        new = {key: row for key, row in zip(keys, rows, strict=True) if known[key] is None}
        factor_of = dict(zip(keys, given, strict=True))
        if new:
            try:
                async with asyncio.timeout(self._deadline_s):
                    with self.admission.admit(len(new)):
                        asked = [factor_of[key] for key in new]
                        steered = [asked] if any(factor is not None for factor in asked) else []
                        scores = await self._score_rows(_transposed(list(new.values())), *steered)
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
        return [known_score for key in keys if (known_score := known[key]) is not None]

    @property
    def fingerprint(self) -> str:
        return self.model.model_fingerprint

    def _factors(self, request: ScoreRequest) -> Factors | None:
        return factors_of(request.weights, self.model.objectives, place="/v1/score") if request.weights else None


def _transposed(rows: Sequence[Row]) -> Rows:
    return [prompt for prompt, _ in rows], [response for _, response in rows]


def _annotators_scales(card: RewardModelCard) -> dict[str, ObjectiveStatistics]:
    """The scale of each annotated objective; empty without annotations."""
    sources = card.score_scale_of or ("",) * len(card.score_mean)
    scales = zip(card.score_mean, card.score_std, sources, strict=True)
    return {
        objective: ObjectiveStatistics(mean=mean, std=std, source=source)
        for k, (objective, (mean, std, source)) in enumerate(zip(card.objectives, scales, strict=False))
        if source not in card.score_statistics or card.score_statistics[source].count[k]
    }


DECODERS = {"gate": "bilinear", "regression": "linear", "bt": "linear", "bt_aux": "linear", "ensemble": "linear"}
"""Decoders of the heads that have only one; a vrm head has the decoder of its config."""


def describe_model(
    card: RewardModelCard, config: ScoringConfig, fingerprint: str, versions: Mapping[str, str]
) -> ModelDescription:
    """The answer to `GET /v1/model` for a checkpoint."""
    return ModelDescription(
        model_fingerprint=fingerprint,
        head=card.head,
        decoder=DECODERS.get(card.head, card.vrm.decoder),
        objectives=list(card.objectives),
        semantic_dims=card.vrm.semantic_dims if card.head == "vrm" else 0,
        max_length=card.max_length,
        reward_mean=card.reward_mean,
        reward_std=card.reward_std,
        mean_contributions=dict(zip(card.objectives, card.mean_contributions, strict=False)),
        objective_statistics=_annotators_scales(card),
        temperature=card.calibration.temperature,
        answer_threshold=card.calibration.answer_threshold,
        answer_error=card.calibration.answer_error,
        scale=card.scale,
        verified_objectives=list(reasons_of_model(card)),
        metrics=dict(card.metrics),
        versions=dict(versions),
        limits=RequestLimits(
            max_request_bytes=config.max_request_bytes,
            max_rows=config.max_rows_per_request,
            max_text_chars=MAX_TEXT_CHARS,
        ),
    )
