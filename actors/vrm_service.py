"""The VRM scoring service on Ray Serve: a reward with its reasons and its error bar.

PPO and outside users take the same road: both reach the replicas through the deployment.
"""

from __future__ import annotations

import hmac
import socket
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import ray
from fastapi import FastAPI, Header, HTTPException
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from pipeline.config.schema import ScoringConfig
from pipeline.errors import DeadlineExceeded, PipelineError, ResourceError
from pipeline.learning.reward_scorer import RewardModelScorer
from pipeline.records import Message, RewardScore
from pipeline.stages import storage

APPLICATION = "vrm"
ATTEMPTS = 3

api = FastAPI(title="VRM scoring service")


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str = Field(max_length=100_000)


class ScoreRequest(BaseModel):
    """One prompt and the responses to score."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | list[ChatMessage]
    responses: list[str] = Field(min_length=1, max_length=256)


class ScoredResponse(BaseModel):
    """reward = sum of contributions, for the VRM head."""

    reward: float
    reward_std: float
    objective_weights: dict[str, float]
    objective_scores: dict[str, float]
    contributions: dict[str, float]


@serve.deployment
@serve.ingress(api)
class VRMService:
    """One replica: a reward model in memory."""

    def __init__(self, model_uri: str, config: ScoringConfig, token: str | None) -> None:
        import torch

        torch.set_num_threads(max(1, int(config.cpus_per_replica)))
        device = "cuda" if config.gpus_per_replica > 0 else "cpu"
        with storage.reading(model_uri) as directory:
            self._scorer = RewardModelScorer.load(
                directory, max_tokens_per_batch=config.max_tokens_per_batch, device=device
            )
        self._token = token
        self._batched.set_max_batch_size(config.max_batch_size)
        self._batched.set_batch_wait_timeout_s(config.batch_wait_s)

    async def score(self, prompts: list[tuple[Message, ...]], responses: list[str]) -> list[RewardScore]:
        """For callers inside the cluster: many (prompt, response) rows in one call."""
        return await self._batched((prompts, responses))

    @serve.batch
    async def _batched(self, calls: list[tuple[list[tuple[Message, ...]], list[str]]]) -> list[list[RewardScore]]:
        """Calls that arrive together are scored together; each gets its own rows back."""
        scores = self._scorer.score(
            [prompt for prompts, _ in calls for prompt in prompts],
            [response for _, responses in calls for response in responses],
        )
        ends = [0]
        for _, responses in calls:
            ends.append(ends[-1] + len(responses))
        return [scores[first:last] for first, last in pairwise(ends)]

    @api.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/v1/model")
    async def model(self, authorization: str | None = Header(default=None)) -> dict[str, Any]:
        self._authorise(authorization)
        return self._scorer.card.model_dump()

    @api.post("/v1/score")
    async def score_over_http(
        self, request: ScoreRequest, authorization: str | None = Header(default=None)
    ) -> list[ScoredResponse]:
        self._authorise(authorization)
        if isinstance(request.prompt, str):
            prompt: tuple[Message, ...] = ({"role": "user", "content": request.prompt},)
        else:
            prompt = tuple(message.model_dump() for message in request.prompt)
        scores = await self._batched(([prompt] * len(request.responses), request.responses))
        return [self._as_response(score) for score in scores]

    def _as_response(self, score: RewardScore) -> ScoredResponse:
        # A Bradley-Terry model gives no reasons: its dicts are empty.
        names = self._scorer.card.objectives[: len(score.objective_weights)]
        weights = dict(zip(names, score.objective_weights, strict=True))
        scores = dict(zip(names, score.objective_scores, strict=True))
        return ScoredResponse(
            reward=score.mean,
            reward_std=score.std,
            objective_weights=weights,
            objective_scores=scores,
            contributions={name: weights[name] * scores[name] for name in names},
        )

    def _authorise(self, authorization: str | None) -> None:
        expected = f"Bearer {self._token}"
        if self._token is not None and not hmac.compare_digest((authorization or "").encode(), expected.encode()):
            raise HTTPException(status_code=401, detail="missing or wrong bearer token")


class ServedScorer:
    """Implements `RewardScorer` through the deployment handle, spreading a batch over the replicas."""

    def __init__(self, handle: DeploymentHandle, config: ScoringConfig, *, deadline_s: float) -> None:
        self._handle = handle
        self._replicas = config.replicas
        self._deadline_s = deadline_s

    def score(self, prompts: Sequence[tuple[Message, ...]], responses: Sequence[str]) -> list[RewardScore]:
        size = max(1, -(-len(responses) // self._replicas))
        shares = [(list(prompts[i : i + size]), list(responses[i : i + size])) for i in range(0, len(responses), size)]
        calls = [self._handle.score.remote(*share) for share in shares]
        return [score for share, call in zip(shares, calls, strict=True) for score in self._result(share, call)]

    def _result(self, share: tuple[list, list], call: Any) -> list[RewardScore]:
        """Scoring is a pure function, so a share whose replica died is simply asked again."""
        for attempt in range(ATTEMPTS):
            try:
                return call.result(timeout_s=self._deadline_s)
            except TimeoutError as error:
                raise DeadlineExceeded(
                    f"the scoring service did not score {len(share[1])} responses within {self._deadline_s:.0f} s. "
                    "Add replicas (cluster.scoring.replicas), or raise cluster.deadlines.score_s."
                ) from error
            except RayTaskError as error:
                if isinstance(error.cause, PipelineError):
                    raise error.cause from error
                raise
            except ray.exceptions.RayActorError:
                if attempt + 1 == ATTEMPTS:
                    raise
                call = self._handle.score.remote(*share)
        raise AssertionError("unreachable")


def start_service(
    model_uri: str, config: ScoringConfig, *, deadline_s: float, token: str | None = None
) -> ServedScorer:
    """Brings the deployment up and waits for its replicas.

    HTTP listens on 127.0.0.1 when `config.port` is set; it asks for `token` as a bearer token, or for none when None.

    Raises:
        ResourceError: the port is taken.
    """
    if config.port:
        require_free_port(config.port)
        serve.start(http_options={"host": "127.0.0.1", "port": config.port})
    else:
        serve.start(proxy_location="Disabled")
    application = VRMService.options(
        num_replicas=config.replicas,
        max_ongoing_requests=4 * config.max_batch_size,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
    ).bind(model_uri, config, token)
    handle = serve.run(application, name=APPLICATION, route_prefix="/")
    return ServedScorer(handle, config, deadline_s=deadline_s)


def stop_service() -> None:
    serve.shutdown()


def require_free_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ResourceError(
                f"port {port} on 127.0.0.1 is in use ({error.strerror}). "
                "Choose another cluster.scoring.port, or 0 for none."
            ) from error
