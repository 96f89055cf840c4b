"""The JSON that the scoring service and its clients exchange. Imports neither torch nor ray.

A request refuses fields that it does not know. An answer may have fields that an older client does not know.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from pipeline.records import Message, Role

TOKEN_VARIABLE = "VRM_SERVICE_TOKEN"
"""Environment variable from which service and clients take the bearer token."""

MAX_TEXT_CHARS = 1_000_000

Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]


class ServiceRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ServiceAnswer(BaseModel):
    """Every answer names the model that gave it."""

    model_config = ConfigDict(protected_namespaces=())

    model_fingerprint: str
    """SHA-256 over the checkpoint's files."""


class ChatMessage(ServiceRequest):
    role: Role
    content: Text


Conversation = Text | Annotated[list[ChatMessage], Field(min_length=1, max_length=256)]
"""A prompt: the text of one user, or every turn before the response of the assistant."""

Responses = Annotated[list[Text], Field(min_length=1, max_length=1024)]


class ScoreRequest(ServiceRequest):
    """One prompt and the responses to score."""

    prompt: Conversation
    responses: Responses
    weights: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = {}
    """Objective -> factor of its weight, as in {"safety": 2}; 1 for the others. The weights are then normalised again,
    so equal factors change nothing. The error bar follows; the model's calibration is that of its own weights."""


class ScoreManyRequest(ServiceRequest):
    """Many prompts, each with its responses."""

    items: Annotated[list[ScoreRequest], Field(min_length=1, max_length=1024)]


def _form(body: Any) -> str:
    return "many" if isinstance(body, dict) and "items" in body else "one"


EitherScoreRequest = Annotated[
    Annotated[ScoreRequest, Tag("one")] | Annotated[ScoreManyRequest, Tag("many")], Discriminator(_form)
]


class ExplainedReward(BaseModel):
    """The reward of one response with its error bar and, for a VRM model, its reasons.

    A reward has no zero, so a reason is a difference: `contributions` say what each objective adds above the mean
    held-out response. A Bradley-Terry model gives no reasons: the mappings are empty, and `concentration` is 0.
    """

    reward: float
    """Posterior mean."""
    reward_std: float
    """What the model does not know of the reward, against that of a mean response to the same prompt."""
    concentration: float
    """Total concentration of the posterior over the weights: a larger one means more certainty."""
    objective_weights: dict[str, float]
    objective_scores: dict[str, float]
    """Scores in units of the reward."""
    ratings: dict[str, float] = {}
    """The same scores on the annotators' own scale, such as 4.2 of 5; empty without annotations."""
    contributions: dict[str, float]
    """weight * score, minus its mean over held-out responses. They add up to `reward` minus `reward_mean` of the model.
    Only those of `verified_objectives` are reasons."""
    deviations: list[float] = []
    """u: `reward_std` is its length, and two responses to one prompt have the covariance u_a . u_b."""
    temperature: float = 1.0
    """T of the model: log-odds are margin / sqrt(T^2 + pi/8 Var[margin])."""


class ScoreAnswer(ServiceAnswer):
    scores: list[ExplainedReward]
    """Scores in the order of the responses."""


class ScoreManyAnswer(ServiceAnswer):
    items: list[list[ExplainedReward]]
    """Scored items in the order of the prompts and their responses."""


class CompareRequest(ServiceRequest):
    """Two responses to one prompt."""

    prompt: Conversation
    a: Text
    b: Text


class CompareAnswer(ServiceAnswer):
    probability: float
    """P(a > b) = sigmoid(E / sqrt(T^2 + pi/8 * Var)) of the margin r(a) - r(b), calibrated on held-out pairs."""
    preferred: Literal["a", "b", "tie"]
    confident: bool
    """Whether `preferred` may be taken as an answer. Of all confident ones at most a share `answer_error` of the model
    is wrong, for pairs like its held-out ones. Otherwise the model cannot tell."""
    margin: float
    margin_std: float
    contributions: dict[str, float]
    """What each objective adds to the margin; they add up to it. Only those of `verified_objectives` are reasons."""
    decided_by: str | None
    """The verified objective with the largest contribution in favour of the preferred response. Null for a tie, without
    objectives, or where an objective that is not verified has a larger one."""
    a: ExplainedReward
    b: ExplainedReward


class BestOfRequest(ServiceRequest):
    """One prompt and the responses to choose from."""

    prompt: Conversation
    responses: Responses
    lcb: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Rank by reward - lcb * reward_std: an uncertain reward must be larger to win."""


class RankedResponse(ExplainedReward):
    """The reward of a response, and what ranks it among the others."""

    index: int
    """Place of the response in the request."""
    bound: float
    """reward - lcb * reward_std."""


class BestOfAnswer(ServiceAnswer):
    best: int
    """Index of the winner."""
    ranking: list[RankedResponse]
    """Best first; equal responses in the order of the request."""


class ObjectiveStatistics(BaseModel):
    """Statistics of the annotated scores of the training split, of the source with most annotations."""

    mean: float
    std: float
    source: str = ""
    """The source of pairs whose annotators' scale it is; empty where the model was not told."""


class RequestLimits(BaseModel):
    """What one request may contain at most."""

    max_request_bytes: int
    max_rows: int
    """Responses of all prompts together."""
    max_text_chars: int


class ModelDescription(ServiceAnswer):
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
    """Mean reward of held-out chosen and rejected responses."""
    reward_std: float
    mean_contributions: dict[str, float]
    """Mean of weight * score over the same responses; they add up to `reward_mean`. Empty where the reward is no sum
    over objectives."""
    objective_statistics: dict[str, ObjectiveStatistics]
    """Empty without annotations."""
    temperature: float
    """T of the log-odds, from held-out pairs; 1 for a model that was never calibrated."""
    answer_threshold: float | None
    """Least |log-odds| of a confident comparison; null where none is confident."""
    answer_error: float
    """Share of confident comparisons that may be wrong."""
    scale: float
    """Units of the reward per standard deviation of the annotations; 1 where none was learned."""
    verified_objectives: list[str]
    """Objectives whose scores order held-out pairs as their annotators do, often enough to be shown as reasons."""
    metrics: dict[str, float]
    """Held-out metrics at the end of training. `reasons/...` say how well the scores agree with annotations."""
    versions: dict[str, str]
    limits: RequestLimits


class Complaint(BaseModel):
    """One thing that is wrong with a request."""

    loc: list[str | int]
    """The path to the field, from "body" on."""
    msg: str
    type: str


class Refusal(BaseModel):
    """The body of every answer whose status is not 200."""

    detail: str | list[Complaint]


class Health(BaseModel):
    status: Literal["ok", "busy"]


def prompt_messages(prompt: str | list[ChatMessage]) -> tuple[Message, ...]:
    """The messages of a prompt in either form."""
    if isinstance(prompt, str):
        return ({"role": "user", "content": prompt},)
    return tuple({"role": message.role, "content": message.content} for message in prompt)
