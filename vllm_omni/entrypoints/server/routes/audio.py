"""`/v1/audio/generate`: sound and music of words."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from vllm_omni.entrypoints.server.answers.encoding import AUDIO_TYPES, audio_bytes, sample_headers
from vllm_omni.entrypoints.server.answers.provenance import Provenance
from vllm_omni.entrypoints.server.context import Call, CallOf
from vllm_omni.entrypoints.server.http.api_error import ApiError
from vllm_omni.entrypoints.server.http.client import while_connected
from vllm_omni.entrypoints.server.http.json_body import JsonRoute
from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.entrypoints.server.requests.building import build_request, graph_keys, require
from vllm_omni.entrypoints.server.schemas.speech import GenerateBody
from vllm_omni.params import DiffusionParams
from vllm_omni.request import OmniOutput

router = APIRouter(route_class=JsonRoute)
DURATION_KEY = "duration_s"


@router.post("/v1/audio/generate", tags=["audio"])
async def generate_audio(body: GenerateBody, call: CallOf, request: Request) -> Response:
    """Sound or music of words. Fields that the model reads besides stand in the body as well: `lyrics`, `bpm`, ..."""
    model = call.parts.models.find(body.model)
    stage = require(model, "audio", model.abilities.audios)[0]
    keys = await graph_keys(model, body.graph_fields, call.parts.settings)
    duration_s = _one_of("duration_s", body.duration_s, "audio_length", body.audio_length)
    reads_duration = DURATION_KEY in model.abilities.request_keys
    if duration_s is not None and reads_duration:
        keys[DURATION_KEY] = duration_s
    prompt = {"prompt": _words(body), **keys}
    drawing = DiffusionParams(
        seed=body.seed,
        num_inference_steps=body.num_inference_steps,
        guidance_scale=body.guidance_scale,
        guidance_interval=body.guidance_interval,
        negative_prompt=body.negative_prompt,
        duration_s=None if reads_duration else duration_s,
    )
    made = build_request(call, model, body, prompt, [stage], diffusion=drawing, extra=body.extra_params)
    run = call.begin(made, model, wants_parts=True)  # `/v1/requests` tells its steps
    output = await while_connected(request, call.parts.runs.final(run))
    return await _answer(body, call, model, output, stage)


async def _answer(body: GenerateBody, call: Call, model: ServedModel, output: OmniOutput, stage: str) -> Response:
    if not output.audios:
        raise ApiError(400, "prompt: the model made no sound of it", code="no_audio", param="prompt")
    made = Provenance.of(model, call.parts.settings, _words(body), body.graph_fields)
    audio, metadata = next(made.audios(output, [stage]))
    content = await audio_bytes(audio, body.response_format, metadata)
    headers = sample_headers(audio, body.response_format)
    return Response(content, 200, headers, AUDIO_TYPES[body.response_format])


def _words(body: GenerateBody) -> str:
    words = _one_of("prompt", body.prompt, "input", body.input)
    if words is None:
        raise ApiError(400, "prompt: missing", code="missing_required_parameter", param="prompt")
    return words


def _one_of(name: str, value: Any, alias: str, other: Any) -> Any:
    if value is not None and other is not None and value != other:
        raise ApiError(400, f"{alias}: another one than {name}; keep one", code="invalid_value", param=alias)
    return other if value is None else value
