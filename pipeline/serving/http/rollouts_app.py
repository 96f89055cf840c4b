"""The page of the kept rollouts: a table that the server pages, and one rollout at a time in full."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import DataError, PipelineError
from pipeline.rollouts.rollout_queries import MAX_PAGE, RolloutFilter, RolloutQueries, SortColumn
from pipeline.serving.http.app import NoTracebacks, require_token
from pipeline.serving.http.routes import PAGE_HEADERS
from pipeline.serving.protocol import ExplainedReward

PAGE = Path(__file__).with_name("rollouts.html")

Rescore = Callable[[list[dict[str, str]], str], ExplainedReward]
"""(messages of the prompt, response) -> what a running service says of it."""

NO_SERVICE = (
    "No reward service is connected. Start one with `vrm serve --model RESULT_OF_train_reward_model`, set "
    "VRM_SERVICE_TOKEN to the token that it prints, and open this page again with `--service http://127.0.0.1:8000`."
)


class RolloutPlace(BaseModel):
    """One kept rollout."""

    model_config = ConfigDict(extra="forbid")

    step: int
    position: int


class AskedRollouts(BaseModel):
    """What the table shows."""

    model_config = ConfigDict(extra="forbid")

    text: str | None = Field(None, max_length=10_000)
    prompt_id: str | None = None
    step_from: int | None = None
    step_to: int | None = None
    finish_reason: str | None = None
    reward_from: float | None = None
    reward_to: float | None = None
    sort: SortColumn = "step"
    descending: bool = False
    offset: int = Field(0, ge=0)
    limit: int = Field(50, ge=1, le=MAX_PAGE)

    def filter(self) -> RolloutFilter:
        return RolloutFilter(**self.model_dump(exclude={"sort", "descending", "offset", "limit"}))


def build_rollouts_api(queries: RolloutQueries, *, title: str, token: str, rescore: Rescore | None) -> FastAPI:
    """The HTTP application of one stage's rollouts.

    Args:
        title: what the page calls the stage.
        token: asked for by everything but the page, which holds no data.
        rescore: asks a reward service again; None if there is none.
    """
    api = FastAPI(title="Kept rollouts", docs_url=None, redoc_url=None, openapi_url=None)
    api.state.token = token
    guarded: dict[str, Any] = {"dependencies": [Depends(require_token)]}

    @api.get("/")
    def page() -> Response:
        return Response(PAGE.read_text(), media_type="text/html", headers=PAGE_HEADERS)

    @api.get("/v1/summary", **guarded)
    def summary() -> dict[str, Any]:
        return queries.summary() | {"title": title, "no_service": NO_SERVICE if rescore is None else ""}

    @api.get("/v1/rollouts", **guarded)
    def rollouts(asked: Annotated[AskedRollouts, Query()]) -> dict[str, Any]:
        total, rows = queries.page(
            asked.filter(), sort=asked.sort, descending=asked.descending, offset=asked.offset, limit=asked.limit
        )
        return {"total": total, "rows": rows}

    @api.get("/v1/rollouts/{step}/{position}", **guarded)
    def rollout(step: int, position: int) -> dict[str, Any]:
        kept = queries.rollout(step, position)
        return kept | {"seed": str(kept["seed"])}  # a number in JavaScript holds 53 of its 62 bits

    @api.post("/v1/rescore", **guarded)
    def score_again(place: RolloutPlace) -> ExplainedReward:
        if rescore is None:
            raise HTTPException(409, NO_SERVICE)
        kept = queries.rollout(place.step, place.position)
        return rescore(kept["messages"], kept["response"])

    @api.exception_handler(PipelineError)
    async def refuse(request: Request, error: PipelineError) -> Response:
        status = 404 if isinstance(error, DataError) else 502
        return Response(json.dumps({"detail": str(error)}), status, media_type="application/json")

    api.add_middleware(NoTracebacks)
    return api
