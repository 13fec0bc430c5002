"""`/v1/models/{model_id}/stages/{stage}/restart`: new engines for a stage, for whoever runs the server."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter

from vllm_omni.entrypoints.server.context import Call, CallOf
from vllm_omni.entrypoints.server.http.api_error import ApiError
from vllm_omni.entrypoints.server.monitoring.readiness import stage_status
from vllm_omni.utils.checks import did_you_mean

router = APIRouter()


@router.post("/v1/models/{model_id}/stages/{stage}/restart", status_code=202, tags=["operations"])
async def restart_stage(model_id: str, stage: str, call: CallOf) -> dict[str, Any]:
    """Begins to restart the replicas of a stage one after another, each once its requests have finished; none is lost.
    `/ready` says when it is over: `num_to_restart` of the stage is 0 again.
    """
    _check_permission(call)
    model = call.parts.models.find(model_id)
    omni = model.omni
    stages = model.pipeline.specs
    if stage not in stages:
        words = f"stage: got {stage!r:.80}{did_you_mean(stage[:80], stages)}"
        raise ApiError(404, words, code="stage_not_found", param="stage")
    timeout_s = call.timeout_s()
    try:
        await asyncio.wait_for(omni.restart_stage(stage), timeout_s)
    except asyncio.TimeoutError:
        words = f"model {model.name!r} is stuck in a step: no answer for {timeout_s:g} s"
        raise ApiError(504, words, code="deadline_exceeded") from None
    about = stage_status(omni.get_status()["stages"][stage])
    return {"object": "stage", "model": model.name, "stage": stage, **about}


def _check_permission(call: Call) -> None:
    """ApiError 403. A page of another site may send a POST without a body, also where it cannot read the answer."""
    settings, headers = call.parts.settings, call.connection.headers
    if not settings.allow_restart:
        words = "this server restarts no stage on request; whoever runs it may say --allow-restart"
        raise ApiError(403, words, code="restart_not_allowed")
    origin = headers.get("origin")
    if origin is not None and origin not in settings.cors_origins and urlsplit(origin).netloc != headers.get("host"):
        raise ApiError(403, f"got the origin {origin!r:.80}, which no --cors-origin names", code="origin_not_allowed")
