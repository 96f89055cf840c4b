"""The service's own routes: page, health, metrics, and the requests of `pipeline/serving/protocol.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import PlainTextResponse

from pipeline.serving.protocol import (
    BestOfAnswer,
    BestOfRequest,
    CompareAnswer,
    CompareRequest,
    EitherScoreRequest,
    Health,
    ModelDescription,
    Refusal,
    ScoreAnswer,
    ScoreManyAnswer,
    ScoreRequest,
)
from pipeline.serving.scoring_service import ScoringService

PAGE = Path(__file__).with_name("page.html")
DOCS = Path(__file__).with_name("docs.html")
PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
}


def service_of(request: Request) -> ScoringService:
    return request.app.state.service


Service = Annotated[ScoringService, Depends(service_of)]

REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Refusal, "description": meaning}
    for status, meaning in (
        (400, "The body is no JSON, or no UTF-8."),
        (413, "The request is too large."),
        (422, "The request means nothing, or a conversation cannot be scored."),
        (429, "The replica is full; Retry-After says when to ask again."),
        (500, "The service failed; its log says why."),
        (504, "The responses were not scored in time."),
    )
}
"""Statuses of refused requests, for the OpenAPI document."""

open_routes = APIRouter()
routes = APIRouter(prefix="/v1")


@open_routes.get("/", include_in_schema=False)
async def page() -> Response:
    """The page for people: a prompt and two responses. It asks for the token, and loads nothing from other hosts."""
    return Response(PAGE.read_text(), media_type="text/html", headers=PAGE_HEADERS)


@open_routes.get("/docs", include_in_schema=False)
async def docs() -> Response:
    """The routes, for people. FastAPI's own page would load its scripts from another host."""
    return Response(DOCS.read_text(), media_type="text/html", headers=PAGE_HEADERS)


@open_routes.get("/healthz")
async def healthz() -> Health:
    """The process answers."""
    return Health(status="ok")


@open_routes.get("/readyz", responses={503: {"model": Health, "description": "It is full."}})
async def readyz(service: Service, response: Response) -> Health:
    """The model is loaded (before that there is no service) and would accept a request now; 503 when it is full."""
    if service.admission.is_full:
        response.status_code = 503
        return Health(status="busy")
    return Health(status="ok")


@open_routes.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus metrics of the replica that answers."""
    return Response(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@routes.get("/model")
async def model(service: Service) -> ModelDescription:
    """The model behind the service: objectives, decoder, statistics, versions."""
    return service.model


@routes.post("/score", responses=REFUSALS)
async def score(request: EitherScoreRequest, service: Service) -> ScoreAnswer | ScoreManyAnswer:
    """Rewards with intervals and reasons: `{prompt, responses}`, or `{items: [{prompt, responses}, ...]}`."""
    return await (service.score(request) if isinstance(request, ScoreRequest) else service.score_many(request))


@routes.post("/compare", responses=REFUSALS)
async def compare(request: CompareRequest, service: Service) -> CompareAnswer:
    """P(a > b), the contribution of each objective, and which one decided."""
    return await service.compare(request)


@routes.post("/best_of", responses=REFUSALS)
async def best_of(request: BestOfRequest, service: Service) -> BestOfAnswer:
    """The responses from best to worst, by reward or by its lower confidence bound."""
    return await service.best_of(request)
