"""`/v1/audio/speech`: words read out, heard while they are said."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from vllm_omni.entrypoints.server.answers.encoding import AUDIO_TYPES, sample_headers
from vllm_omni.entrypoints.server.answers.usage import media_usage
from vllm_omni.entrypoints.server.context import Call, CallOf
from vllm_omni.entrypoints.server.http.api_error import as_api_error
from vllm_omni.entrypoints.server.http.client import all_of, while_connected
from vllm_omni.entrypoints.server.http.event_stream import PartStream, event_stream
from vllm_omni.entrypoints.server.http.json_body import JsonRoute
from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.entrypoints.server.schemas.speech import SpeechBatchBody, SpeechBody, SpeechItem
from vllm_omni.entrypoints.server.speaking.speech import Speech, speaker_of

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/audio/speech", tags=["audio"])
async def create_speech(body: SpeechBody, call: CallOf, request: Request) -> Response:
    """Words read out. The bytes come while they are said: those of a file, or base64 in events (`stream_format`)."""
    model = call.parts.models.find(body.model)
    speaker = await speaker_of(call, model, body, body)
    speech = speaker.say(speaker.run(body.input))
    if body.wants_events:
        return event_stream(_events(speech, model), call.parts.settings)

    def headers() -> Mapping[str, str]:
        return {} if speech.first is None else sample_headers(speech.first, body.response_format)

    return PartStream(
        speech.pieces(),
        call.parts.settings,
        AUDIO_TYPES[body.response_format],
        encode=lambda piece: piece,
        headers=headers,
        first_s=None,
    )


@router.post("/v1/audio/speech/batch", tags=["audio"])
async def create_speech_batch(body: SpeechBatchBody, call: CallOf, request: Request) -> dict[str, Any]:
    """Several texts, each with its own sound or its own error."""
    model = call.parts.models.find(body.model)
    works = [_result(index, body.merged(item), body, call, model) for index, item in enumerate(body.items)]
    results = await while_connected(request, all_of(works))
    succeeded = sum(result["status"] == "success" for result in results)
    counts = {"total": len(results), "succeeded": succeeded, "failed": len(results) - succeeded}
    return {"id": f"speech-batch-{call.run_id}", "results": list(results), **counts}


async def _events(speech: Speech, model: ServedModel) -> AsyncGenerator[Mapping[str, Any], None]:
    async with aclosing(speech.pieces()) as pieces:
        async for piece in pieces:
            yield {"type": "speech.audio.delta", "audio": base64.b64encode(piece).decode()}
    assert speech.final is not None
    yield {"type": "speech.audio.done", "usage": dict(media_usage(model, speech.final))}


async def _result(
    index: int, item: SpeechItem, body: SpeechBatchBody, call: Call, model: ServedModel
) -> dict[str, Any]:
    about: dict[str, Any] = {"index": index, "audio_data": None, "media_type": None, "error": None, "usage": None}
    try:
        speaker = await speaker_of(call, model, item, body)
        speech = speaker.say(speaker.run(item.input, index))
        content = b"".join([piece async for piece in speech.pieces()])
    except Exception as error:
        return {**about, "status": "error", "error": as_api_error(error).body["error"]}
    assert speech.final is not None
    return {
        **about,
        "status": "success",
        "audio_data": base64.b64encode(content).decode(),
        "media_type": AUDIO_TYPES[item.response_format],
        "usage": dict(media_usage(model, speech.final)),
    }
