"""`/v1/images`: pictures of words, and pictures of pictures."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image
from starlette.responses import JSONResponse, Response

from vllm_omni.entrypoints.server.answers.image_answer import ImageAnswer
from vllm_omni.entrypoints.server.answers.provenance import Provenance
from vllm_omni.entrypoints.server.context import Call, CallOf
from vllm_omni.entrypoints.server.http.api_error import ApiError, unsupported
from vllm_omni.entrypoints.server.http.client import while_connected
from vllm_omni.entrypoints.server.http.event_stream import event_stream
from vllm_omni.entrypoints.server.http.form_body import form_schema, read_form
from vllm_omni.entrypoints.server.http.json_body import JsonRoute
from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.entrypoints.server.requests.building import build_request, require
from vllm_omni.entrypoints.server.runs import Run
from vllm_omni.entrypoints.server.schemas.base import diffusion
from vllm_omni.entrypoints.server.schemas.images import ImageBody, VariationBody
from vllm_omni.media.image_input import read_image

router = APIRouter(route_class=JsonRoute)
FILE_FIELDS = {"image": "image", "image[]": "image", "mask": "mask", "mask_image": "mask"}


@router.post("/v1/images/generations", tags=["images"])
async def create_image(body: ImageBody, call: CallOf, request: Request) -> Response:
    """Pictures of a prompt; with `stream`, previews while they emerge (`partial_images`)."""
    return await _draw(body, {}, call, request, "image_generation")


@router.post("/v1/images/edits", tags=["images"], openapi_extra=form_schema(ImageBody, FILE_FIELDS))
async def edit_image(call: CallOf, request: Request) -> Response:
    """Pictures of a prompt and of pictures."""
    body, files = await read_form(request, ImageBody, FILE_FIELDS)
    return await _draw(body, files, call, request, "image_edit")


@router.post("/v1/images/variations", tags=["images"], openapi_extra=form_schema(VariationBody, FILE_FIELDS))
async def vary_image(call: CallOf, request: Request) -> Response:
    """Pictures that are like a picture."""
    body, files = await read_form(request, VariationBody, FILE_FIELDS)
    return await _draw(body, files, call, request, "image_edit")


async def _draw(
    body: ImageBody, files: Mapping[str, Sequence[bytes]], call: Call, request: Request, kind: str
) -> Response:
    model = call.parts.models.find(body.model)
    stages = require(model, "images", model.abilities.images)
    _check_stream(body)
    sources = await asyncio.to_thread(_sources, files, model) if kind == "image_edit" else {}
    run = image_run(body, sources, model, stages, call)
    made = Provenance.of(model, call.parts.settings, body.prompt)
    answer = ImageAnswer(made, body, stages, kind)
    if body.stream:
        return event_stream(answer.events(call.parts.runs.parts(run)), call.parts.settings)
    output = await while_connected(request, call.parts.runs.final(run))
    return JSONResponse(await answer.whole(output))


def _check_stream(body: ImageBody) -> None:
    if body.partial_images and not body.stream:
        raise unsupported("partial_images", "are parts of a stream; say stream: true")
    if body.output_compression is not None and body.output_format == "png":
        raise unsupported("output_compression", "is of jpeg and webp; png loses nothing")


def _sources(files: Mapping[str, Sequence[bytes]], model: ServedModel) -> dict[str, Any]:
    """The pictures of a form, as keys of a prompt."""
    if not model.abilities.edits:
        raise ApiError(
            400, f"model: no stage of {model.name!r} takes an image", code="unsupported_by_model", param="model"
        )
    images = [_opened(content, model, f"image[{index}]") for index, content in enumerate(files.get("image", ()))]
    if not images:
        raise ApiError(400, "image: missing", code="missing_required_parameter", param="image")
    masks = [_opened(content, model, "mask", "RGBA") for content in files.get("mask", ())]
    if len(masks) > 1:
        raise ApiError(400, f"mask: got {len(masks)} files, expected one", code="invalid_value", param="mask")
    if masks and "mask" not in model.abilities.request_keys:
        raise unsupported("mask", "no stage of this model reads it; leave it out")
    return {"image": images if len(images) > 1 else images[0], **({"mask": masks[0]} if masks else {})}


def _opened(content: bytes, model: ServedModel, name: str, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(read_image(content, model.config.limits, name, mode).numpy())


def image_run(body: ImageBody, sources: dict[str, Any], model: ServedModel, stages: Sequence[str], call: Call) -> Run:
    """The body as a run, not begun. sources: the pictures that the caller brings, as keys of a prompt."""
    drawing = diffusion(body, num_outputs=body.n, num_previews=body.partial_images)
    # where the graph writes before it draws, what it wrote is the revised prompt
    outputs = [*model.abilities.texts, *stages]
    prompt = {"prompt": body.prompt, **sources}
    made = build_request(call, model, body, prompt, outputs, diffusion=drawing, extra=body.extra_params)
    return call.begin(made, model, wants_parts=True)  # few steps, and `/v1/requests` tells them
