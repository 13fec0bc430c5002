"""`/v1/videos`: videos of words and of a picture, as jobs in the shape of OpenAI's, or at once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from vllm_omni.entrypoints.server.answers.encoding import VIDEO_TYPES, video_bytes
from vllm_omni.entrypoints.server.answers.job_answer import POLL_HEADERS, After, Limit, Order, file_of, page_of
from vllm_omni.entrypoints.server.answers.provenance import Provenance
from vllm_omni.entrypoints.server.context import Call, CallOf
from vllm_omni.entrypoints.server.http.api_error import ApiError, unsupported
from vllm_omni.entrypoints.server.http.client import begun, while_connected
from vllm_omni.entrypoints.server.http.form_body import form_schema, read_form_or_json
from vllm_omni.entrypoints.server.jobs import Job
from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.entrypoints.server.requests.building import build_request, require
from vllm_omni.entrypoints.server.requests.media_fetch import read_source
from vllm_omni.entrypoints.server.runs import Run
from vllm_omni.entrypoints.server.schemas.base import diffusion
from vllm_omni.entrypoints.server.schemas.videos import VideoBody
from vllm_omni.request import OmniOutput

router = APIRouter()
REFERENCE = "input_reference"
FILE_FIELDS = {REFERENCE: REFERENCE}
SCHEMA = form_schema(VideoBody, FILE_FIELDS, or_json=True)


@router.post("/v1/videos", tags=["videos"], openapi_extra=SCHEMA)
async def create_video(call: CallOf, request: Request) -> Response:
    """Begins a video, and answers at once."""
    order = await _order(call, request)
    parts = await begun(call.parts.runs.parts(order.run))
    facts = {"prompt": order.body.prompt, "seconds": order.seconds, "size": order.body.size or "auto"}

    async def encode(output: OmniOutput) -> Sequence[tuple[bytes, str]]:
        content, measures = await order.file(output)
        facts.update(measures)
        return [(content, order.body.output_format)]

    try:
        job = call.parts.jobs.start(order.run, "video", parts, encode, facts)
    except ApiError:
        await parts.aclose()
        raise
    return JSONResponse(_describe(job), 200, POLL_HEADERS)


@router.post("/v1/videos/sync", tags=["videos"], openapi_extra=SCHEMA)
async def make_video(call: CallOf, request: Request) -> Response:
    """The file itself, when it is done; a client that goes away aborts it."""
    order = await _order(call, request)
    output = await while_connected(request, call.parts.runs.final(order.run))
    content, measures = await order.file(output)
    headers = {"x-run-id": order.run.id, "x-video-seconds": measures["seconds"], "x-video-size": measures["size"]}
    return Response(content, 200, headers, VIDEO_TYPES[order.body.output_format])


@router.get("/v1/videos", tags=["videos"])
async def list_videos(call: CallOf, after: After = None, limit: Limit = 20, order: Order = "desc") -> dict[str, Any]:
    """The videos that are kept, from behind `after` on."""
    videos = [job for job in call.parts.jobs.all() if job.kind == "video"]
    return page_of(videos, _describe, after, limit, order)


@router.get("/v1/videos/{video_id}", tags=["videos"])
async def retrieve_video(video_id: str, call: CallOf) -> Response:
    """How far a video is."""
    return JSONResponse(_describe(_find(call, video_id)), 200, POLL_HEADERS)


@router.get("/v1/videos/{video_id}/content", tags=["videos"])
async def retrieve_content(video_id: str, call: CallOf, variant: Literal["video"] = "video") -> Response:
    """The file of a completed video, or a range of its bytes."""
    return file_of(_find(call, video_id), 0)


@router.delete("/v1/videos/{video_id}", tags=["videos"])
async def delete_video(video_id: str, call: CallOf) -> dict[str, Any]:
    """Aborts a video where it is being made, and deletes its file."""
    job = _find(call, video_id)
    await call.parts.jobs.delete(job)
    return {"id": job.id, "object": "video.deleted", "deleted": True}


@dataclass(frozen=True, slots=True)
class _Order:
    """A video that is asked for, as a run that has not begun."""

    body: VideoBody
    run: Run
    made_by: Provenance
    stage: str
    seconds: str  # as far as it is known before; empty else

    async def file(self, output: OmniOutput) -> tuple[bytes, dict[str, str]]:
        """The file, and what is to be said of it; ApiError 400 where the model made none."""
        found = next(self.made_by.videos(output, [self.stage]), None)
        if found is None:
            raise ApiError(400, "prompt: the model made no video of it", code="no_video", param="prompt")
        video, metadata = found
        content = await video_bytes(video, self.body.output_format, metadata)
        return content, {"seconds": f"{video.duration_s:g}", "size": f"{video.width}x{video.height}"}


async def _order(call: Call, request: Request) -> _Order:
    body, files = await read_form_or_json(request, VideoBody, FILE_FIELDS)
    model = call.parts.models.find(body.model)
    stage = require(model, "videos", model.abilities.videos)[0]
    sources = await asyncio.to_thread(_sources, body, files, model, call)
    run = video_run(body, sources, model, call)
    made_by = Provenance.of(model, call.parts.settings, body.prompt, body.extra_params)
    fps, seconds = body.fps or model.abilities.frame_rate, body.seconds
    if body.num_frames is not None and fps is not None:
        seconds = body.num_frames / fps
    return _Order(body, run, made_by, stage, "" if seconds is None else f"{seconds:g}")


def video_run(body: VideoBody, sources: Mapping[str, bytes], model: ServedModel, call: Call) -> Run:
    """The body as a run, not begun. sources: the picture that the caller brings, as a key of a prompt."""
    drawing = diffusion(body, num_outputs=None, num_frames=_num_frames(body, model), fps=body.fps)
    prompt = {"prompt": body.prompt, **sources}
    stages = model.abilities.videos[:1]
    made = build_request(call, model, body, prompt, stages, diffusion=drawing, extra=body.extra_params)
    return call.begin(made, model, wants_parts=True, wants_steps=True)


def _num_frames(body: VideoBody, model: ServedModel) -> int | None:
    """So many seconds lie between the first frame and the last; None where the body says nothing of it."""
    if body.seconds is None:
        return body.num_frames
    if body.num_frames is not None:
        raise ApiError(400, "seconds: given together with num_frames; keep one", code="invalid_value", param="seconds")
    return round(body.seconds * (body.fps or model.abilities.frame_rate or 1)) + 1


def _sources(body: VideoBody, files: Mapping[str, Sequence[bytes]], model: ServedModel, call: Call) -> dict[str, bytes]:
    """Its pixels are read by the stage, beside the loop. Blocks where it is to be fetched."""
    pictures = list(files.get(REFERENCE, ()))
    if body.input_reference is not None:
        pictures.append(read_source(body.input_reference, REFERENCE, call.parts.settings))
    if len(pictures) > 1:
        raise ApiError(400, f"{REFERENCE}: got {len(pictures)}, expected one", code="invalid_value", param=REFERENCE)
    if pictures and "image" not in model.abilities.request_keys:
        raise unsupported(REFERENCE, "no stage of this model reads it; leave it out")
    return {"image": pictures[0]} if pictures else {}


def _find(call: Call, video_id: str) -> Job:
    job = call.parts.jobs.find(video_id)
    if job.kind != "video":
        raise ApiError(404, f"video {video_id!r:.80} is unknown, or has expired", code="video_not_found")
    return job


def _describe(job: Job) -> dict[str, Any]:
    """In OpenAI's fields."""
    kept = ("id", "status", "progress", "created_at", "completed_at", "expires_at", "model", "error")
    said = job.describe()
    return {"object": "video", **{name: said[name] for name in kept}, **job.facts, "remixed_from_video_id": None}
