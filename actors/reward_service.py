"""The VRM scoring service on Ray Serve: a reward with its reasons and its error bar.

PPO and outside users ask the same questions of the same API: outsiders over HTTP, PPO through the deployment's handle.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import socket
import time
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise

import httpx
import ray
from fastapi import FastAPI
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.deployment import Application
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from actors.ray_errors import DIED
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
from pipeline.ports import RewardScorer
from pipeline.records import RewardScore
from pipeline.serving.admission import Admission
from pipeline.serving.cache import ScoreCache
from pipeline.serving.http.app import build_api
from pipeline.serving.protocol import TOKEN_VARIABLE
from pipeline.serving.scoring_service import Rows, ScoringService, describe
from pipeline.stages import storage
from pipeline.stages.fingerprint import directory_fingerprint
from pipeline.stages.runner import installed_versions

APPLICATION = "vrm"
POLL_S = 0.2
ROUTES_S = 10.0
"""How long the HTTP proxy may take to say what it serves."""
DRAIN_S = 60.0
"""How long a replica that is to end may work on what it took on; clients ask again for what it then drops."""
OWN_ERROR = re.compile(r"^pipeline\.errors\.(\w+: .+)$", re.MULTILINE)
LOOK_BACK_S = 11.0
"""Over which the length of the queue is averaged. Serve samples it every 10 s and wants a longer window."""


def score_together(scorer: RewardScorer, calls: Sequence[Rows]) -> list[list[RewardScore] | PipelineError]:
    """Calls that arrived together are scored together; each gets its own rows back, or its own error."""
    try:
        scores = scorer.score(
            [prompt for prompts, _ in calls for prompt in prompts],
            [response for _, responses in calls for response in responses],
        )
    except PipelineError as error:
        if len(calls) == 1:
            return [error]
        # One bad call must not fail those that happened to arrive with it.
        return [result for call in calls for result in score_together(scorer, [call])]
    ends = [0]
    for _, responses in calls:
        ends.append(ends[-1] + len(responses))
    return [scores[first:last] for first, last in pairwise(ends)]


@serve.deployment
@serve.ingress()
class VRMService:
    """One replica: a reward model in memory, the same for as long as it lives.

    Another checkpoint comes with other replicas. So a replica's answers, its fingerprint and what its cache remembers
    never belong to two models.
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
        model = describe(self._scorer.card, config, fingerprint, installed_versions())
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
        self._batched.set_max_batch_size(config.max_batch_size)
        self._batched.set_batch_wait_timeout_s(config.batch_wait_s)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls it once the model is loaded."""
        return self._api

    async def answer(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer to an HTTP request that came through a handle."""
        answer = await self._without_a_socket.request(method, path, headers=headers, content=body)
        return answer.status_code, dict(answer.headers), answer.content

    async def _score_rows(self, rows: Rows) -> list[RewardScore]:
        scores = await self._batched(rows)
        if isinstance(scores, PipelineError):
            raise scores
        return scores

    @serve.batch
    async def _batched(self, calls: list[Rows]) -> list[list[RewardScore] | PipelineError]:
        # In a thread: /healthz answers while a long batch is scored.
        return await asyncio.to_thread(score_together, self._scorer, calls)


def start_service(
    model_uri: str,
    config: ScoringConfig,
    *,
    start_s: float,
    deadline_s: float,
    name: str = APPLICATION,
    token: str | None = None,
) -> ServedScorer:
    """Brings the application up and waits for its replicas.

    HTTP listens on `config.host` when `config.port` is set; it asks for `token` as a bearer token, for none when None.
    `deadline_s` is how long a request may take, over HTTP and through the handle.
    A cluster has one Serve for all its jobs, so `name` must be the job's own. An application of that name is replaced:
    only a killed run of the same job can have left it.

    Raises:
        ConfigError: others than this machine could reach it, and there is no token.
        ResourceError: the port is taken, another application holds it, or Serve runs already and does not listen there.
        WorkerError: the replicas did not start, say because the checkpoint does not load.
        DeadlineExceeded: they, or the HTTP proxy, were not up after `start_s`.
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
            time.sleep(POLL_S)
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
    """Rolls another checkpoint into a running service: one replica with it starts, then one without it ends, and so on.

    A replica that ends first answers what it took on, so no request fails; for a while answers name the one fingerprint
    or the other. It needs room for one replica more. A checkpoint that does not start never answers anybody: the
    service stays with `previous_uri`, and the error of `start_service` is raised.
    """
    swapped = scoring_application(model_uri, config, token=token, deadline_s=deadline_s)
    _deploy(swapped, config, name)
    try:
        _wait_until_running(name, start_s)
    except PipelineError:
        # The old replicas still answer, but Serve would replace a dead one with the new checkpoint.
        _deploy(scoring_application(previous_uri, config, token=token, deadline_s=deadline_s), config, name)
        _wait_until_running(name, start_s)
        raise


def scoring_application(model_uri: str, config: ScoringConfig, *, token: str | None, deadline_s: float) -> Application:
    """The service as Serve deploys it. `token` and `deadline_s` as for `start_service`."""
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
    return VRMService.options(
        **scale,
        max_ongoing_requests=4 * config.max_batch_size,
        # Each proxy and each handle has such a queue of its own: many users over HTTP never shut out a training run.
        max_queued_requests=4 * config.max_batch_size,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1.0),
        graceful_shutdown_timeout_s=DRAIN_S,
        max_constructor_retry_count=2,  # once may be a node that died; twice is the checkpoint
        max_surge_percent=1,  # rounded up to one replica: a new one starts before an old one ends
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
    ).bind(model_uri, config, token, deadline_s)


def stop_service(name: str = APPLICATION) -> None:
    """Ends this application, and Serve itself when nobody else's is left on the cluster."""
    _delete(name)
    if not serve.status().applications:
        serve.shutdown()


def leave_service(name: str = APPLICATION) -> None:
    """`stop_service` for a process that leaves the cluster next, and so does not wait until Serve has ended.

    Serve ends by killing its controller, and Ray tells whoever is there to hear it that the calls in flight failed.
    """
    _delete(name)
    if not serve.status().applications:
        try:
            controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        except ValueError:  # it did not get as far as to start
            return
        ray.wait([controller.graceful_shutdown.remote(wait=False)], timeout=DRAIN_S)


def service_token() -> str:
    """The token of VRM_SERVICE_TOKEN, or a fresh one."""
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
        time.sleep(POLL_S)


def _reason(application: ApplicationStatusOverview) -> str:
    """Serve tells why a replica failed sometimes of the application, sometimes only of its deployment.

    It sends the whole traceback; when one of our errors ended it, that is what the user should read.
    """
    told = [application.message, *(deployment.message for deployment in application.deployments.values())]
    messages = [letter for text in told for letter in OWN_ERROR.findall(text)]
    if messages:
        return messages[-1]
    return "; ".join(dict.fromkeys(text.strip() for text in told if text.strip())) or "no reason given"


def _start_http(config: ScoringConfig) -> None:
    """The cluster's one Serve may have been started by another job, which chose another port, or none."""
    status = serve.status()
    if not (status.proxies or status.applications):
        require_free_port(config.host, config.port)
    elif _routed(config) is None:
        raise ResourceError(
            f"Serve already runs on this cluster and does not listen on port {config.port} of this machine. "
            "Choose cluster.scoring.port=0, or end it with `serve shutdown` when nobody uses it."
        )
    # On a busy machine a proxy may miss the time that Serve gives it; Serve then starts another one by itself.
    with suppress(*DIED, TimeoutError):
        serve.start(http_options={"host": config.host, "port": config.port})


def _routed(config: ScoringConfig) -> Collection[str] | None:
    """The applications that Serve answers for on our port; None when no Serve answers there."""
    host = "127.0.0.1" if config.host == "0.0.0.0" else config.host
    try:
        with urllib.request.urlopen(f"http://{host}:{config.port}/-/routes", timeout=ROUTES_S) as answer:
            return set(json.loads(answer.read()).values())
    except (OSError, ValueError, AttributeError):
        return None


def require_token_if_exposed(host: str, token: str | None) -> None:
    if token is None and host not in ("127.0.0.1", "localhost", "::1"):
        raise ConfigError(
            f"a service on {host!r} without a token would answer whoever reaches this machine. "
            "Give it a token, or let it listen on 127.0.0.1."
        )


def require_free_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourceError(
                f"port {port} on {host} cannot be had ({error.strerror}). "
                "Choose another cluster.scoring.port, or 0 for none."
            ) from error
