"""`/v1/chat/completions`: words, pictures and sound in; words, pictures and sound out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from vllm_omni.entrypoints.server.answers.chat_answer import ChatAnswer
from vllm_omni.entrypoints.server.context import Call, CallOf
from vllm_omni.entrypoints.server.http.api_error import ApiError, unsupported
from vllm_omni.entrypoints.server.http.client import while_connected
from vllm_omni.entrypoints.server.http.event_stream import event_stream
from vllm_omni.entrypoints.server.http.json_body import JsonRoute
from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.entrypoints.server.requests.building import build_request, require, voice_key
from vllm_omni.entrypoints.server.requests.chat_prompt import chat_prompt
from vllm_omni.entrypoints.server.runs import Run
from vllm_omni.entrypoints.server.schemas.base import diffusion
from vllm_omni.entrypoints.server.schemas.chat import ChatBody, StreamOptions, Voice
from vllm_omni.params import DiffusionParams, SamplingParams

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions", tags=["chat"])
async def create_chat_completion(body: ChatBody, call: CallOf, request: Request) -> Response:
    """The next message of a conversation: its words, and the pictures and the sound that its model makes."""
    model = call.parts.models.find(body.model)
    outputs = chat_outputs(body, model)
    if body.stream_options is not None and not body.stream:
        raise unsupported("stream_options", "is of streams alone; say stream: true")
    if body.partial_images and not body.stream:
        raise unsupported("partial_images", "are parts of a stream; say stream: true")
    run = await chat_run(body, model, outputs, call)
    answer = ChatAnswer(model, call.run_id, outputs, _audio_format(body, model, outputs), _num_top(body))
    if not body.stream:
        output = await while_connected(request, call.parts.runs.final(run))
        return JSONResponse(await answer.whole(output))
    chunks = answer.chunks(call.parts.runs.parts(run), body.stream_options or StreamOptions())
    return event_stream(chunks, call.parts.settings)


def chat_outputs(body: ChatBody, model: ServedModel) -> Sequence[str]:
    """The stages whose results are wanted: `modalities`, else words, pictures and, where `audio` is given, sound."""
    able = model.abilities
    kinds = {"text": able.texts, "image": able.images, "audio": able.audios}
    if body.modalities is None:
        only_sound = not able.texts and not able.images
        wanted = [*able.texts, *able.images, *(able.audios if body.audio is not None or only_sound else ())]
        return require(model, "text, images or audio", wanted)
    for kind in body.modalities:
        require(model, kind, kinds[kind])
    if body.audio is not None and "audio" not in body.modalities:
        raise unsupported("audio", "is of answers with sound; say modalities: ['text', 'audio']")
    # words that are spoken are made anyway, and are the sound's transcript
    is_wanted = {*body.modalities, *(["text"] if "audio" in body.modalities else [])}
    return [stage for kind, stages in kinds.items() if kind in is_wanted for stage in stages]


def _audio_format(body: ChatBody, model: ServedModel, outputs: Sequence[str]) -> str | None:
    if not set(model.abilities.audios) & set(outputs):
        return None
    return body.audio.format if body.audio is not None else "wav"


def _num_top(body: ChatBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise unsupported("top_logprobs", "is of log probabilities alone; say logprobs: true")
    return (body.top_logprobs or 0) if body.logprobs else None


async def chat_run(body: ChatBody, model: ServedModel, outputs: Sequence[str], call: Call) -> Run:
    """The body as a run, not begun. outputs: as of `chat_outputs`."""
    prompt: dict[str, Any] = await chat_prompt(body, model, call.parts.settings)
    if body.audio is not None:
        voice = body.audio.voice
        prompt |= voice_key(model, voice.id if isinstance(voice, Voice) else voice)
    sampling, drawing = _params(body, model)
    omni_request = build_request(
        call, model, body, prompt, outputs, sampling=sampling, diffusion=drawing, extra=body.extra_params
    )
    wants_steps = body.stream_options is not None and body.stream_options.include_progress
    return call.begin(omni_request, model, wants_parts=body.stream, wants_steps=wants_steps)


def _params(body: ChatBody, model: ServedModel) -> tuple[SamplingParams | None, DiffusionParams]:
    """Of a writer and of what draws; a graph without a writer makes `n` pictures, or sounds."""
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise ApiError(400, "max_tokens: another number than max_completion_tokens", param="max_tokens")
    max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    sampling = body.sampling(max_tokens=max_tokens, logprobs=_num_top(body))
    if model.abilities.writer is not None:
        return sampling, diffusion(body, num_previews=body.partial_images)
    drawing = diffusion(body, num_outputs=body.n, num_previews=body.partial_images)
    bare = SamplingParams(**{name: getattr(sampling, name) for name in _of_writers(sampling)})
    return bare, drawing


def _of_writers(sampling: SamplingParams) -> list[str]:
    """What is set that only a writer reads."""
    names = SamplingParams.__dataclass_fields__
    return [name for name in names if name not in ("n", "seed", "lora") and getattr(sampling, name) is not None]
