"""The scoring service on Ray Serve: `RewardService` is one replica, the functions start, swap and stop them.

PPO and outside users use the same API: users over HTTP, PPO through the deployment's handle.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import time
import urllib.request
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any, Protocol, cast

import httpx
import ray
from fastapi import FastAPI
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.deployment import Application, Deployment
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from actors.ray_errors import ACTOR_DIED
from actors.served_scorer import ADDRESS, ServedScorer
from pipeline.config.cluster import ScoringConfig
from pipeline.errors import (
    ConfigError,
    DeadlineExceeded,
    PipelineError,
    ResourceError,
    WorkerError,
)
from pipeline.evaluation.reward_scorer import RewardModelScorer
from pipeline.learning.memory import keep_freed_memory
from pipeline.records import RewardScore
from pipeline.serving.admission import Admission
from pipeline.serving.cache import ScoreCache
from pipeline.serving.free_port import require_free_port
from pipeline.serving.http.app import build_api
from pipeline.serving.protocol import TOKEN_VARIABLE
from pipeline.serving.scoring_service import RowFactors, Rows, ScoringService, describe_model
from pipeline.serving.shared_batch import score_together
from pipeline.stages import storage
from pipeline.stages.fingerprint import directory_fingerprint
from pipeline.stages.runner import installed_versions

APPLICATION = "vrm"
STATUS_POLL_S = 0.2
ROUTES_S = 10.0
"""How long the HTTP proxy may take to list the applications that it serves."""
DRAIN_S = 60.0
"""How long a replica that must end may work on the requests that it accepted. Clients send dropped requests again."""
OWN_ERROR = re.compile(r"^pipeline\.errors\.(\w+: .+)$", re.MULTILINE)
"""The last line of a traceback that ends with one of our errors."""
LOOK_BACK_S = 11.0
"""Serve averages the length of the queue over this time. Serve samples it every 10 s, and needs a longer window."""


class BatchSettings(Protocol):
    """What Serve adds to a batched method; its stubs leave these two out."""

    def set_max_batch_size(self, new_max_batch_size: int) -> None:
        """Sets how many calls a batch holds at most."""

    def set_batch_wait_timeout_s(self, new_batch_wait_timeout_s: float) -> None:
        """Sets how long an incomplete batch waits for more calls."""


@serve.deployment
@serve.ingress()
class RewardService:
    """One replica: a reward model in memory, the same as long as the replica lives.

    Another checkpoint comes with new replicas. So a replica's answers, its fingerprint and its cache always belong to
    one model.
    """

    def __init__(self, model_uri: str, config: ScoringConfig, token: str | None, deadline_s: float) -> None:
        import torch

        torch.set_num_threads(config.threads_per_replica or max(1, int(config.cpus_per_replica)))
        device = "cuda" if config.gpus_per_replica > 0 else "cpu"
        keep_freed_memory(torch.device(device))
        with storage.reading(model_uri) as directory:
            self._scorer = RewardModelScorer.load(
                directory, max_tokens_per_batch=config.max_tokens_per_batch, device=device
            )
            fingerprint = directory_fingerprint(directory)
        model = describe_model(self._scorer.card, config, fingerprint, installed_versions())
        self._service = ScoringService(
            self._score_rows,
            model,
            admission=Admission(config.max_pending_rows),
            cache=ScoreCache(config.cache_entries),
            deadline_s=deadline_s,
        )
        replica = serve.get_replica_context().replica_id.unique_id
        self._api = build_api(self._service, token=token, replica=replica)
        self._without_a_socket = httpx.AsyncClient(
            transport=httpx.ASGITransport(self._api), base_url=ADDRESS, timeout=None
        )
        batch_settings = cast(BatchSettings, self._score_batch)
        batch_settings.set_max_batch_size(config.max_batch_size)
        batch_settings.set_batch_wait_timeout_s(config.batch_wait_s)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve asks for the HTTP application once the model is loaded."""
        return self._api

    async def answer(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer to an HTTP request that came through a handle."""
        answer = await self._without_a_socket.request(method, path, headers=headers, content=body)
        return answer.status_code, dict(answer.headers), answer.content

    async def _score_rows(self, rows: Rows, factors: RowFactors | None = None) -> list[RewardScore]:
        scores = await self._score_batch((rows, factors))
        if isinstance(scores, PipelineError):
            raise scores
        return scores

    @serve.batch
    async def _score_batch(
        self, calls: list[tuple[Rows, RowFactors | None]]
    ) -> list[list[RewardScore] | PipelineError]:
        # A caller passes one call; Serve collects the calls that wait. It runs one batch at a time, so only one thread
        # uses the model. The event loop stays free meanwhile: /healthz answers while a long batch is scored.
        rows, factors = zip(*calls, strict=True)
        return await asyncio.to_thread(score_together, self._scorer, rows, factors)


def start_service(
    model_uri: str,
    config: ScoringConfig,
    *,
    start_s: float,
    deadline_s: float,
    name: str = APPLICATION,
    token: str | None = None,
) -> ServedScorer:
    """Starts the application and waits for its replicas.

    If `config.port` is set, HTTP listens on `config.host`. It asks for `token` as a bearer token; for no token if None.
    `deadline_s` is how long a request may take, over HTTP and through the handle.
    A cluster has one Serve for all its jobs, so `name` must be the job's own. An application of that name is replaced:
    only a killed run of the same job can have left it.

    Raises:
        ConfigError: other machines could reach the service, and there is no token.
        ResourceError: the port is taken, another application holds it, or Serve runs already and does not listen there.
        WorkerError: the replicas did not start, perhaps because the checkpoint does not load.
        DeadlineExceeded: the replicas, or the HTTP proxy, were not up after `start_s`.
    """
    deadline = time.monotonic() + start_s
    if config.port:
        require_token_if_exposed(config.host, token)
        _start_http(config)
    else:
        serve.start(proxy_location="Disabled")
    _delete(name)
    handle = _deploy(scoring_application(model_uri, config, token=token, deadline_s=deadline_s), config, name)
    _wait_until_running(name, start_s)
    if config.port:
        while name not in (_routed(config) or ()):
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"Serve's HTTP proxy did not answer for the scoring service on port {config.port} within "
                    f"{start_s:g} s. Raise cluster.deadlines.start_s, or choose cluster.scoring.port=0."
                )
            time.sleep(STATUS_POLL_S)
    return ServedScorer(handle, config, deadline_s=deadline_s, token=token)


def swap_model(
    model_uri: str,
    previous_uri: str,
    config: ScoringConfig,
    *,
    start_s: float,
    deadline_s: float,
    name: str = APPLICATION,
    token: str | None = None,
) -> None:
    """Rolls another checkpoint into a running service: a replica with it starts, then one without it ends, and so on.

    A replica answers the requests that it accepted before it ends, so no request fails. For a while answers name one
    fingerprint or the other. The swap needs resources for one more replica. A checkpoint that does not start answers no
    request: the service stays with `previous_uri`, and the error of `start_service` is raised.
    """
    swapped = scoring_application(model_uri, config, token=token, deadline_s=deadline_s)
    _deploy(swapped, config, name)
    try:
        _wait_until_running(name, start_s)
    except PipelineError:
        # The old replicas still answer, but Serve would start the new checkpoint in place of a replica that dies.
        _deploy(scoring_application(previous_uri, config, token=token, deadline_s=deadline_s), config, name)
        _wait_until_running(name, start_s)
        raise


def scoring_application(model_uri: str, config: ScoringConfig, *, token: str | None, deadline_s: float) -> Application:
    """The service as Serve deploys it. `token` and `deadline_s` as for `start_service`."""
    scale: dict[str, Any]
    if config.max_replicas is None:
        scale = {"num_replicas": config.replicas}
    else:
        scale = {
            "num_replicas": "auto",
            "autoscaling_config": AutoscalingConfig(
                min_replicas=config.replicas,
                max_replicas=config.max_replicas,
                target_ongoing_requests=config.requests_per_replica,
                upscale_delay_s=config.upscale_delay_s,
                downscale_delay_s=config.downscale_delay_s,
                look_back_period_s=LOOK_BACK_S,
            ),
        }
    # Serve's decorators turn the class into a deployment; mypy does not follow decorators of classes.
    return (
        cast(Deployment, RewardService)
        .options(
            **scale,
            max_ongoing_requests=4 * config.max_batch_size,
            # Each proxy and each handle has its own queue: users over HTTP cannot shut out a training run.
            max_queued_requests=4 * config.max_batch_size,
            backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1.0),
            graceful_shutdown_timeout_s=DRAIN_S,
            max_constructor_retry_count=2,  # one failure may be a node that died, a second one is the checkpoint's
            max_surge_percent=1,  # rounded up to one replica: a new one starts before an old one ends
            ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
        )
        .bind(model_uri, config, token, deadline_s)
    )


def scorer_of_application(name: str, config: ScoringConfig, *, deadline_s: float) -> ServedScorer:
    """A scorer of an application that somebody else runs on this cluster, with the token of the environment.

    Raises:
        ConfigError: Serve has no such application.
    """
    applications = serve.status().applications
    if name not in applications:
        raise ConfigError(
            f"Serve has no application {name!r} on this cluster (alignment.rewards: model); it has "
            f"{', '.join(sorted(applications)) or 'none'}. Start it with `vrm serve`, or give the URL of an endpoint."
        )
    token = os.environ.get(TOKEN_VARIABLE)
    return ServedScorer(serve.get_app_handle(name), config, deadline_s=deadline_s, token=token)


def stop_service(name: str = APPLICATION) -> None:
    """Ends this application, and Serve itself if no other application is left on the cluster."""
    _delete(name)
    if not serve.status().applications:
        serve.shutdown()


def leave_service(name: str = APPLICATION) -> None:
    """Does what `stop_service` does, without waiting until Serve has ended: for a process that leaves the cluster next.

    Serve ends by killing its controller. A process that stayed would read that its calls in flight failed.
    """
    _delete(name)
    if not serve.status().applications:
        try:
            controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        except ValueError:  # Serve has not started
            return
        ray.wait([controller.graceful_shutdown.remote(wait=False)], timeout=DRAIN_S)


def service_token() -> str:
    """The token of the environment variable, or a new random one."""
    return os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(24)


def _deploy(application: Application, config: ScoringConfig, name: str) -> DeploymentHandle:
    target = serve.RunTarget(application, name=name, route_prefix="/" if config.port else None)
    try:
        [handle] = serve.run_many([target], wait_for_applications_running=False)
    except RayServeException as error:
        raise ResourceError(
            f"Serve already answers HTTP for another application on this cluster: {error.args[0]}. "
            "Choose cluster.scoring.port=0, or end the other job."
        ) from error
    return handle


def _delete(name: str) -> None:
    if name in serve.status().applications:
        serve.delete(name)


def _wait_until_running(name: str, start_s: float) -> None:
    deadline = time.monotonic() + start_s
    while True:
        application = serve.status().applications[name]
        match application.status:
            case ApplicationStatus.RUNNING:
                return
            case ApplicationStatus.DEPLOY_FAILED | ApplicationStatus.UNHEALTHY:
                raise WorkerError(f"the scoring service did not start: {_reason(application)}")
        if time.monotonic() > deadline:
            raise DeadlineExceeded(
                f"the scoring service was not up after {start_s:g} s: {_reason(application)}. "
                "Free the CPUs or GPUs of cluster.scoring, or raise cluster.deadlines.start_s."
            )
        time.sleep(STATUS_POLL_S)


def _reason(application: ApplicationStatusOverview) -> str:
    """Why a replica failed: our own error where there is one, otherwise all that Serve says.

    Serve gives the reason sometimes with the application, sometimes only with its deployment, as a whole traceback.
    """
    texts = [application.message, *(deployment.message for deployment in application.deployments.values())]
    error_messages = [message for text in texts for message in OWN_ERROR.findall(text)]
    if error_messages:
        return error_messages[-1]
    return "; ".join(dict.fromkeys(text.strip() for text in texts if text.strip())) or "no reason given"


def _start_http(config: ScoringConfig) -> None:
    """Starts Serve with its HTTP proxy, unless another job has started the cluster's one Serve.

    Raises:
        ResourceError: the port is taken, or the other job chose another port, or none.
    """
    status = serve.status()
    if not (status.proxies or status.applications):
        require_free_port(config.host, config.port, remedy="another cluster.scoring.port, or 0 for none")
    elif _routed(config) is None:
        raise ResourceError(
            f"Serve already runs on this cluster and does not listen on port {config.port} of this machine. "
            "Choose cluster.scoring.port=0, or end it with `serve shutdown` when nobody uses it."
        )
    # On a busy machine a proxy may not start in the time that Serve allows. Serve then starts another one itself.
    with suppress(*ACTOR_DIED, TimeoutError):
        serve.start(http_options={"host": config.host, "port": config.port})


def _routed(config: ScoringConfig) -> Collection[str] | None:
    """The applications that Serve answers for on our port; None if no Serve answers there."""
    host = "127.0.0.1" if config.host == "0.0.0.0" else config.host
    try:
        with urllib.request.urlopen(f"http://{host}:{config.port}/-/routes", timeout=ROUTES_S) as answer:
            return set(json.loads(answer.read()).values())
    except (OSError, ValueError, AttributeError):
        return None


def require_token_if_exposed(host: str, token: str | None) -> None:
    """Raises ConfigError if other machines can reach `host` and there is no token."""
    if token is None and host not in ("127.0.0.1", "localhost", "::1"):
        raise ConfigError(
            f"a service on {host!r} without a token would answer whoever reaches this machine. "
            "Give it a token, or let it listen on 127.0.0.1."
        )
