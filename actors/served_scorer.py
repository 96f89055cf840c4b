"""The scoring service for callers inside the cluster: a `VRMScorer` whose requests travel through a Serve handle.

PPO and outside users use the same client and the same API. Requests through a handle only skip the socket.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy

import httpx
from ray.exceptions import RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from actors.ray_errors import ACTOR_DIED
from pipeline.config.cluster import ScoringConfig
from pipeline.records import Message, RewardScore
from pipeline.serving.client import VRMScorer, as_reward_score

ADDRESS = "http://scoring-service"
"""The service's name in error messages; no socket has this name."""


class HandleTransport(httpx.BaseTransport):
    """Sends HTTP requests to the deployment's `answer` through a handle, for `httpx.Client` and so for `VRMScorer`.

    A replica that dies or refuses looks as it would over a socket, so the client tries again in the same way. While
    another replica starts, Serve keeps the request waiting.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._answer = handle.answer

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        call = self._answer.remote(request.method, request.url.raw_path.decode(), dict(request.headers), request.read())
        try:
            status, headers, body = call.result(timeout_s=request.extensions["timeout"]["read"])
        except TimeoutError as error:
            call.cancel()
            raise httpx.ReadTimeout("no answer in time", request=request) from error
        except BackPressureError as error:
            return httpx.Response(429, json={"detail": str(error)}, request=request)
        except (*ACTOR_DIED, DeploymentUnavailableError) as error:
            raise httpx.RemoteProtocolError(
                f"a replica died: {error}. If memory ran out, lower cluster.scoring.max_tokens_per_batch",
                request=request,
            ) from error
        except RayTaskError as error:
            return httpx.Response(500, json={"detail": str(error)}, request=request)
        return httpx.Response(status, headers=headers, content=body, request=request)


class ServedScorer:
    """Implements `RewardScorer` with a `VRMScorer`, spreading each batch evenly over the replicas."""

    def __init__(
        self, handle: DeploymentHandle, config: ScoringConfig, *, deadline_s: float, token: str | None = None
    ) -> None:
        self._transport = HandleTransport(handle)
        self._replicas = config.max_replicas or config.replicas
        self._max_rows = config.max_rows_per_request
        self._deadline_s = deadline_s
        self._token = token
        self._weights: dict[str, float] = {}

    def client(self, *, rows: int) -> VRMScorer:
        """A client whose requests spread calls of `rows` rows evenly over the replicas."""
        share = -(-rows // self._replicas)
        return VRMScorer(
            ADDRESS,
            transport=self._transport,
            token=self._token,
            deadline_s=self._deadline_s,
            batch_size=max(1, min(share, self._max_rows)),
            concurrency=self._replicas,
        )

    def score(self, prompts: Sequence[tuple[Message, ...]], responses: Sequence[str]) -> list[RewardScore]:
        """Scores in the order given.

        Raises:
            DataError, WorkerError, DeadlineExceeded: as `VRMScorer.score_rows`.
        """
        with self.client(rows=len(responses)) as scorer:
            answer = scorer.score_rows(prompts, responses, weights=self._weights)
            return [as_reward_score(scored) for scored in answer.scores]

    def steered(self, weights: Mapping[str, float]) -> ServedScorer:
        """The same service with re-weighted objectives: objective -> factor of its weight."""
        other = copy(self)
        other._weights = dict(weights)
        return other
