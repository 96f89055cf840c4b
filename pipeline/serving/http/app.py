"""The scoring service over HTTP: routes, token and errors around a `ScoringService`, without Ray."""

from __future__ import annotations

import hmac
import json
import logging
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBasic, HTTPBasicCredentials, HTTPBearer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.errors import DataError, DeadlineExceeded, NumericsError, Overloaded, PipelineError
from pipeline.serving.http.compat import compat_routes
from pipeline.serving.http.metrics import Measured, ServiceMetrics
from pipeline.serving.http.routes import open_routes, routes, service_of
from pipeline.serving.protocol import Refusal
from pipeline.serving.scoring_service import ScoringService

logger = logging.getLogger(__name__)

STATUS_OF: tuple[tuple[type[PipelineError], int], ...] = (
    (DataError, 422),
    (Overloaded, 429),
    (NumericsError, 500),
    (DeadlineExceeded, 504),
)
"""Errors whose message the client reads. The message of every other error goes to the service's log only."""


def build_api(service: ScoringService, *, token: str | None, replica: str) -> FastAPI:
    """The HTTP application. It asks for `token` wherever the model is used; for no token if None.

    Args:
        replica: name of the replica in the metrics.
    """
    # Not FastAPI's docs pages, which load their scripts from other hosts: /docs is a page of ours.
    api = FastAPI(title="VRM scoring service", version="1", docs_url=None, redoc_url=None)
    api.state.service = service
    api.state.token = token
    api.state.metrics = metrics = ServiceMetrics(service, replica=replica)
    api.include_router(open_routes)
    guard: dict[str, Any] = {}
    if token is not None:
        guard["dependencies"] = [Depends(require_token)]
        guard["responses"] = {401: {"model": Refusal, "description": "The token is missing or wrong."}}
    for router in (routes, compat_routes):
        api.include_router(router, **guard)
    api.exception_handler(RequestValidationError)(_refuse_body)
    api.exception_handler(PipelineError)(_answer_pipeline_error)
    api.add_middleware(BoundedBody, max_bytes=service.model.limits.max_request_bytes)
    api.add_middleware(NoTracebacks)
    api.add_middleware(Measured, metrics=metrics)
    return api


Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
Basic = Annotated[HTTPBasicCredentials | None, Depends(HTTPBasic(auto_error=False))]


def require_token(request: Request, bearer: Bearer, basic: Basic) -> None:
    """Takes the bearer token, or the password of basic authentication: OpenRLHF can only put a token into the URL.

    Raises:
        HTTPException: 401.
    """
    given = bearer.credentials if bearer else basic.password if basic else ""
    if not hmac.compare_digest(given.encode(), request.app.state.token.encode()):
        raise HTTPException(401, "missing or wrong bearer token", headers={"www-authenticate": "Bearer"})


class BoundedBody:
    """Stops reading a request that is larger than `max_bytes`, whatever length it declares."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def bounded_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413, self._refusal)
            return message

        declared = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if declared.isdigit() and len(declared) < 20 and int(declared) <= self._max_bytes:
            await self._app(scope, bounded_receive, send)
        else:
            await _error(413, self._refusal)(scope, receive, send)

    @property
    def _refusal(self) -> str:
        return f"a request may hold {self._max_bytes} bytes. Split it, or raise cluster.scoring.max_request_bytes."


class NoTracebacks:
    """The outermost layer: logs unexpected errors, and tells the client only that there was one.

    Without it Starlette would raise the error again after its answer, and Serve would send the traceback to the client.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception:
            logger.exception("%s %s failed", scope.get("method"), scope.get("path"))
            if scope["type"] != "http" or started:
                raise
            await _error(500, "the service failed; its log says why")(scope, receive, send)


def _error(status: int, detail: Any, headers: dict[str, str] | None = None) -> Response:
    # json.dumps writes ASCII, so text from the request (half a surrogate pair in a field name) cannot break the answer.
    return Response(json.dumps({"detail": detail}), status, headers=headers, media_type="application/json")


async def _refuse_body(request: Request, error: RequestValidationError) -> Response:
    """Says what is wrong and where, without the input, which may be huge, secret, or no JSON (NaN).

    Names of fields come from the input as well, so they are cut.
    """
    complaints = [
        {
            "loc": [place if isinstance(place, int) else place[:100] for place in e["loc"]],
            "msg": e["msg"],
            "type": e["type"],
        }
        for e in error.errors()[:20]
    ]
    return _error(422, complaints)


async def _answer_pipeline_error(request: Request, error: PipelineError) -> Response:
    for kind, status in STATUS_OF:
        if isinstance(error, kind):
            wait = {"retry-after": str(service_of(request).admission.retry_after_s)} if status == 429 else None
            return _error(status, str(error), wait)
    logger.error("%s %s failed: %s", request.method, request.url.path, error)
    return _error(500, "the service failed; its log says why")
