"""`/v1/jobs`: pictures and sounds that take long, in the shape of OpenAI's videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import JSONResponse, Response

from vllm_omni.entrypoints.server.answers.encoding import audio_bytes, image_bytes
from vllm_omni.entrypoints.server.answers.job_answer import POLL_HEADERS, After, Limit, Order, file_of, page_of
from vllm_omni.entrypoints.server.answers.provenance import Provenance
from vllm_omni.entrypoints.server.context import CallOf
from vllm_omni.entrypoints.server.http.api_error import ApiError
from vllm_omni.entrypoints.server.http.client import begun
from vllm_omni.entrypoints.server.http.json_body import JsonRoute
from vllm_omni.entrypoints.server.jobs import Encode, Job
from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.entrypoints.server.requests.building import build_request, require
from vllm_omni.entrypoints.server.schemas.base import diffusion
from vllm_omni.entrypoints.server.schemas.jobs import JobBody
from vllm_omni.request import OmniOutput

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/jobs", tags=["jobs"])
async def create_job(body: JobBody, call: CallOf) -> Response:
    """Begins a job, and answers at once."""
    model = call.parts.models.find(body.model)
    kind = _kind(body, model)
    stages = require(model, kind, model.abilities.images if kind == "image" else model.abilities.audios)
    suffix = body.file_format(kind)
    if suffix is None:
        known = ", ".join(body.has_files_of[kind])
        raise ApiError(
            400,
            f"output_format: got {body.output_format!r}, expected one of {known} for {kind}",
            code="invalid_value",
            param="output_format",
        )
    drawing = diffusion(body, num_outputs=body.n)
    made = build_request(call, model, body, {"prompt": body.prompt}, stages, diffusion=drawing, extra=body.extra_params)
    run = call.begin(made, model, wants_parts=True, wants_steps=True)
    made_by = Provenance.of(model, call.parts.settings, body.prompt, body.extra_params)
    parts = await begun(call.parts.runs.parts(run))
    try:
        job = call.parts.jobs.start(run, kind, parts, _encoder(kind, suffix, stages, made_by))
    except ApiError:
        await parts.aclose()
        raise
    return JSONResponse(job.describe(), 200, POLL_HEADERS)


@router.get("/v1/jobs", tags=["jobs"])
async def list_jobs(
    call: CallOf,
    after: After = None,
    limit: Limit = 20,
    order: Order = "desc",
) -> dict[str, Any]:
    """The jobs that are kept, from behind `after` on."""
    return page_of(call.parts.jobs.all(), Job.describe, after, limit, order)


@router.get("/v1/jobs/{job_id}", tags=["jobs"])
async def retrieve_job(job_id: str, call: CallOf) -> Response:
    """How far a job is."""
    job = call.parts.jobs.find(job_id)
    return JSONResponse(job.describe(), 200, POLL_HEADERS)


@router.get("/v1/jobs/{job_id}/content", tags=["jobs"])
async def retrieve_content(job_id: str, call: CallOf, index: Annotated[int, Query(ge=0)] = 0) -> Response:
    """One of the files of a completed job."""
    job = call.parts.jobs.find(job_id)
    return file_of(job, index)


@router.delete("/v1/jobs/{job_id}", tags=["jobs"])
async def delete_job(job_id: str, call: CallOf) -> dict[str, Any]:
    """Aborts a job where it runs, and deletes its files."""
    job = call.parts.jobs.find(job_id)
    await call.parts.jobs.delete(job)
    return {"id": job.id, "object": "job.deleted", "deleted": True}


def _kind(body: JobBody, model: ServedModel) -> str:
    made = [kind for kind in ("image", "audio") if kind in model.abilities.makes]
    if body.kind is not None:
        return body.kind
    require(model, "images or audio", made)
    by_format = [kind for kind in made if body.output_format in body.has_files_of[kind]]
    if len(made) > 1 and not by_format:
        raise ApiError(400, "kind: missing; this model makes images and audio", code="invalid_value", param="kind")
    return (by_format or made)[0]


def _encoder(kind: str, suffix: str, stages: Sequence[str], made_by: Provenance) -> Encode:
    async def encode(output: OmniOutput) -> Sequence[tuple[bytes, str]]:
        if kind == "image":
            images = made_by.images(output, stages)
            contents = [await image_bytes(image, suffix, metadata=metadata) for image, metadata in images]
        else:
            contents = [
                await audio_bytes(audio, suffix, metadata) for audio, metadata in made_by.audios(output, stages)
            ]
        if not contents:
            raise ApiError(400, f"prompt: the model made no {kind} of it", code=f"no_{kind}", param="prompt")
        return [(content, suffix) for content in contents]

    return encode
