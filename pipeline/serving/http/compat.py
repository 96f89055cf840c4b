"""The scoring service in the forms that other trainers use, so that their users need to change only a URL.

    POST /get_reward   OpenRLHF's remote reward model (`--reward.remote_url`)
    POST /classify     vLLM serving a sequence-classification reward model; verl's reward loop reads it
    POST /pooling      the same, as a vector of one number
    POST /score        the same, for pairs of prompt and response

The forms are those of OpenRLHF 0.11.2 and vLLM 0.32. Fields that have no meaning here (`labels`, `priority`, a chat
template) are ignored. Prompts given as token ids are refused: they are the policy's tokens, not the reward model's.
"""

from __future__ import annotations

import base64
import math
import struct
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from pipeline.data.rendered_chat import split_rendered, without_ending
from pipeline.errors import DataError
from pipeline.records import RewardScore
from pipeline.serving.answers import contributions
from pipeline.serving.http.routes import REFUSALS, Service
from pipeline.serving.protocol import ChatMessage, Text, prompt_messages
from pipeline.serving.scoring_service import Row, ScoringService

compat_routes = APIRouter(responses=REFUSALS)

Texts = Annotated[list[Text], Field(min_length=1, max_length=1024)]


class Lenient(BaseModel):
    """A request of another trainer, whose unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())


# ---------------------------------------------------------------------- OpenRLHF


class RemoteRewardRequest(Lenient):
    """Prompt and response in one text, as the policy saw them; `prompts` are the beginnings of these texts."""

    query: Texts
    prompts: Texts | None = None


class RemoteRewardAnswer(Lenient):
    rewards: list[float]
    scores: list[float]
    """The rewards again: OpenRLHF filters prompts by this field."""
    extra_logs: dict[str, list[float]]
    """Standard deviation, and what each objective adds above the mean held-out response. OpenRLHF logs the means."""
    model_fingerprint: str


@compat_routes.post("/get_reward")
async def get_reward(request: RemoteRewardRequest, service: Service) -> RemoteRewardAnswer:
    """OpenRLHF's remote reward model. The rewards are raw: no sigmoid."""
    prompts: Sequence[str | None] = request.prompts or [None] * len(request.query)
    if len(prompts) != len(request.query):
        raise DataError(f"{len(request.query)} queries but {len(prompts)} prompts")
    scores = await service.scores([split_rendered(*row) for row in zip(request.query, prompts, strict=True)])
    rewards = [score.mean for score in scores]
    return RemoteRewardAnswer(
        rewards=rewards,
        scores=rewards,
        extra_logs={"vrm/reward_std": [score.std for score in scores], **_contributions(service, scores)},
        model_fingerprint=service.fingerprint,
    )


# -------------------------------------------------------------------------- vLLM


class Usage(BaseModel):
    """Token counts. Always 0: vLLM's clients expect the fields, and this service does not count."""

    prompt_tokens: int = 0
    total_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: None = None
    completion_tokens_details: None = None


UseActivation = Annotated[bool | None, Field(validation_alias=AliasChoices("use_activation", "activation"))]
"""As in vLLM, a single logit passes through a sigmoid unless this is false. vLLM once called it `activation`."""


class PoolingRequest(Lenient):
    """A conversation that ends with the response: rendered texts (`input`, one or many), or `messages`."""

    input: Text | Texts | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=2, max_length=256)] | None = None
    task: Literal["classify"] | None = None
    use_activation: UseActivation = None
    encoding_format: Literal["float", "base64"] = "float"

    def rows(self) -> list[Row]:
        if (self.input is None) == (self.messages is None):
            raise DataError("give either `input` or `messages`")
        if self.messages is not None:
            if self.messages[-1].role != "assistant":
                raise DataError(f"a conversation to score ends with the assistant, not with {self.messages[-1].role!r}")
            return [(prompt_messages(self.messages[:-1]), self.messages[-1].content)]
        texts = [self.input] if isinstance(self.input, str) else self.input or []
        return [split_rendered(text) for text in texts]


class PairRequest(Lenient):
    """Prompts and responses under any of vLLM's names: one with one, one with many, or equally many of both."""

    queries: Text | Texts | None = None
    documents: Text | Texts | None = None
    items: Text | Texts | None = None
    text_1: Text | Texts | None = None
    text_2: Text | Texts | None = None
    data_1: Text | Texts | None = None
    data_2: Text | Texts | None = None
    use_activation: UseActivation = None

    def rows(self) -> list[Row]:
        names = (
            (self.queries, self.documents),
            (self.queries, self.items),
            (self.text_1, self.text_2),
            (self.data_1, self.data_2),
        )
        given = [(_as_list(one), _as_list(two)) for one, two in names if one is not None and two is not None]
        if len(given) != 1:
            raise DataError(
                "give `queries` and `documents` (or `items`), or `text_1` and `text_2`, or `data_1` and `data_2`"
            )
        [(prompts, responses)] = given
        if len(prompts) == 1:
            prompts = prompts * len(responses)
        if len(prompts) != len(responses):
            raise DataError(f"{len(prompts)} prompts for {len(responses)} responses: one, or one each")
        rows = zip(prompts, responses, strict=True)
        return [(prompt_messages(prompt), without_ending(response)) for prompt, response in rows]


class ListAnswer(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    """The model's fingerprint."""
    usage: Usage = Usage()


class ClassifyItem(BaseModel):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyAnswer(ListAnswer):
    data: list[ClassifyItem]


class PoolingItem(BaseModel):
    index: int
    object: Literal["pooling"] = "pooling"
    data: list[float] | str


class PoolingAnswer(ListAnswer):
    data: list[PoolingItem]


class PairItem(BaseModel):
    index: int
    object: Literal["score"] = "score"
    score: float


class PairAnswer(ListAnswer):
    data: list[PairItem]


@compat_routes.post("/classify")
async def classify(request: PoolingRequest, service: Service) -> ClassifyAnswer:
    """vLLM's classification with one class: sigmoid of the reward, or with `use_activation` false the reward itself."""
    values = _activated(await service.scores(request.rows()), request.use_activation)
    data = [ClassifyItem(index=i, label="LABEL_0", probs=[value], num_classes=1) for i, value in enumerate(values)]
    return ClassifyAnswer(data=data, **_header("classify", service))


@compat_routes.post("/pooling")
async def pooling(request: PoolingRequest, service: Service) -> PoolingAnswer:
    """vLLM's pooling output, a vector of one number: the reward if `use_activation` is false, else its sigmoid."""
    values = _activated(await service.scores(request.rows()), request.use_activation)
    data = [PoolingItem(index=i, data=_encoded(value, request.encoding_format)) for i, value in enumerate(values)]
    return PoolingAnswer(data=data, **_header("pooling", service))


@compat_routes.post("/score")
async def score_pairs(request: PairRequest, service: Service) -> PairAnswer:
    """vLLM's score of pairs: the query is the prompt, the document its response.

    The score is the sigmoid of the reward, between 0 and 1; the reward itself if `use_activation` is false.
    """
    values = _activated(await service.scores(request.rows()), request.use_activation)
    return PairAnswer(
        data=[PairItem(index=i, score=value) for i, value in enumerate(values)], **_header("score", service)
    )


def _as_list(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def _activated(scores: Sequence[RewardScore], use_activation: bool | None) -> list[float]:
    if use_activation is False:
        return [score.mean for score in scores]
    return [0.5 * (1.0 + math.tanh(0.5 * score.mean)) for score in scores]  # a sigmoid that cannot overflow


def _encoded(value: float, encoding: Literal["float", "base64"]) -> list[float] | str:
    return [value] if encoding == "float" else base64.b64encode(struct.pack("<f", value)).decode()


def _contributions(service: ScoringService, scores: Sequence[RewardScore]) -> dict[str, list[float]]:
    relative = [contributions(service.model, score) for score in scores]
    return {f"vrm/{name}": [row[name] for row in relative] for name in relative[0]}


def _header(kind: str, service: ScoringService) -> dict[str, Any]:
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.fingerprint}
