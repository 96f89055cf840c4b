"""What the scoring service and its clients say to each other, as JSON. Imports neither torch nor ray.

A request refuses fields it does not know; an answer may hold more than an older client knows.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from pipeline.records import Message, Role

TOKEN_VARIABLE = "VRM_SERVICE_TOKEN"
"""Environment variable that both sides take the bearer token from."""

MAX_TEXT_CHARS = 1_000_000

Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Answer(BaseModel):
    """Every answer names the model that gave it."""

    model_config = ConfigDict(protected_namespaces=())

    model_fingerprint: str
    """SHA-256 over the checkpoint's files."""


class ChatMessage(Request):
    role: Role
    content: Text


Conversation = Text | Annotated[list[ChatMessage], Field(min_length=1, max_length=256)]
"""A prompt: the words of one user, or every turn up to where the assistant speaks."""

Responses = Annotated[list[Text], Field(min_length=1, max_length=1024)]


class ScoreRequest(Request):
    """One prompt and the responses to score."""

    prompt: Conversation
    responses: Responses


class ScoreManyRequest(Request):
    """Many prompts, each with its responses."""

    items: Annotated[list[ScoreRequest], Field(min_length=1, max_length=1024)]


def _form(body: Any) -> str:
    return "many" if isinstance(body, dict) and "items" in body else "one"


EitherScoreRequest = Annotated[
    Annotated[ScoreRequest, Tag("one")] | Annotated[ScoreManyRequest, Tag("many")], Discriminator(_form)
]


class ScoredResponse(BaseModel):
    """The reward of one response with its error bar and, for a VRM model, its reasons.

    reward = sum of contributions, contribution = weight * score. A Bradley-Terry model gives no reasons: its mappings
    are empty, and `reward_std` and `concentration` are 0.
    """

    reward: float
    """Posterior mean."""
    reward_std: float
    """Posterior standard deviation."""
    concentration: float
    """Total concentration of the posterior over the weights: the larger, the surer."""
    objective_weights: dict[str, float]
    objective_scores: dict[str, float]
    contributions: dict[str, float]
    deviations: list[float] = []
    """Halves u and v, where the reward is no sum of contributions: rewards a and b of two responses to one prompt have
    the covariance (u_a . v_b + v_a . u_b) / 2."""


class ScoreAnswer(Answer):
    scores: list[ScoredResponse]
    """In the order of the responses."""


class ScoreManyAnswer(Answer):
    items: list[list[ScoredResponse]]
    """In the order of the prompts and their responses."""


class CompareRequest(Request):
    """Two responses to one prompt."""

    prompt: Conversation
    a: Text
    b: Text


class CompareAnswer(Answer):
    probability: float
    """P(a > b) = sigmoid(E / sqrt(1 + pi/8 * Var)) of the margin r(a) - r(b)."""
    preferred: Literal["a", "b", "tie"]
    margin: float
    margin_std: float
    contributions: dict[str, float]
    """What each objective adds to the margin."""
    decided_by: str | None
    """The objective that speaks loudest for the preferred response; null for a tie, or without objectives."""
    a: ScoredResponse
    b: ScoredResponse


class BestOfRequest(Request):
    """One prompt and the candidates to choose from."""

    prompt: Conversation
    responses: Responses
    lcb: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Rank by reward - lcb * reward_std: a doubtful reward must be larger to win."""


class Candidate(ScoredResponse):
    index: int
    """Its place in the request."""
    bound: float
    """reward - lcb * reward_std."""


class BestOfAnswer(Answer):
    best: int
    """Index of the winner."""
    ranking: list[Candidate]
    """Best first; equal ones in the order given."""


class ObjectiveStatistics(BaseModel):
    """Of the annotated scores of the training split."""

    mean: float
    std: float


class Limits(BaseModel):
    """Of one request."""

    max_request_bytes: int
    max_rows: int
    """Responses, over all prompts."""
    max_text_chars: int


class ModelAnswer(Answer):
    """The model behind the service."""

    model_config = ConfigDict(protected_namespaces=())

    head: str
    decoder: str
    """How weights and features become a reward."""
    objectives: list[str]
    semantic_dims: int
    """0 for a Bradley-Terry model."""
    max_length: int
    """Tokens of prompt and response together. A longer prompt is cut from the left, a longer response at its end."""
    reward_mean: float
    """Over held-out chosen and rejected responses."""
    reward_std: float
    objective_statistics: dict[str, ObjectiveStatistics]
    """Empty without annotations."""
    metrics: dict[str, float]
    """Held-out metrics at the end of training."""
    versions: dict[str, str]
    limits: Limits


class Complaint(BaseModel):
    """One thing that is wrong with a request."""

    loc: list[str | int]
    """The way to the field, from "body" on."""
    msg: str
    type: str


class Refusal(BaseModel):
    """What every answer other than 200 says."""

    detail: str | list[Complaint]


class Health(BaseModel):
    status: Literal["ok", "busy"]


def as_messages(prompt: str | list[ChatMessage]) -> tuple[Message, ...]:
    """The conversation a prompt stands for."""
    if isinstance(prompt, str):
        return ({"role": "user", "content": prompt},)
    return tuple({"role": message.role, "content": message.content} for message in prompt)
