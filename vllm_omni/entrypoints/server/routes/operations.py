"""`/health`, `/ready`, `/v1/requests`: how the server is, and how far its requests are."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, PlainTextResponse, Response

from vllm_omni.entrypoints.server.context import CallOf
from vllm_omni.entrypoints.server.monitoring.readiness import readiness
from vllm_omni.entrypoints.server.monitoring.timeline import chrome_trace
from vllm_omni.entrypoints.server.runs import describe

router = APIRouter()


@router.get("/health", tags=["operations"])
async def health() -> dict[str, str]:
    """The process lives."""
    return {"status": "ok"}


@router.get("/ready", tags=["operations"])
async def ready(call: CallOf) -> Response:
    """Every stage of every model answers; else 503, and which does not."""
    status = readiness(call.parts)
    return JSONResponse(status, 200 if status["status"] == "ready" else 503)


@router.get("/v1/requests", tags=["operations"])
async def list_requests(call: CallOf) -> dict[str, Any]:
    """The requests that wait or run."""
    return {"object": "list", "data": [describe(run) for run in call.parts.runs.living]}


@router.get("/v1/requests/{request_id}", tags=["operations"])
async def retrieve_request(request_id: str, call: CallOf) -> dict[str, Any]:
    """Where a request is: its stages and their steps."""
    return dict(describe(call.parts.runs.find(request_id)))


@router.get("/v1/requests/{request_id}/timeline", tags=["operations"])
async def retrieve_timeline(request_id: str, call: CallOf) -> dict[str, Any]:
    """When its stages waited and worked, as a Chrome trace."""
    return chrome_trace(call.parts.runs.find(request_id))


@router.get("/metrics", tags=["operations"], response_class=PlainTextResponse)
async def metrics(call: CallOf) -> Response:
    """Counters, histograms and gauges, in the text format of Prometheus."""
    return PlainTextResponse(await call.parts.metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.delete("/v1/requests/{request_id}", tags=["operations"])
async def cancel_request(request_id: str, call: CallOf) -> dict[str, Any]:
    """Aborts a request between two steps; its caller gets an error."""
    run = call.parts.runs.find(request_id)
    if not run.is_ended:
        run.model.omni.abort(run.id)
    return {"id": run.id, "object": "request.cancelled", "cancelled": not run.is_ended}
