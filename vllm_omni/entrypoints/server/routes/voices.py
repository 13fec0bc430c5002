"""`/v1/audio/voices`: who may speak: the checkpoints' own voices, and those that callers add."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request

from vllm_omni.entrypoints.server.context import Call, CallOf
from vllm_omni.entrypoints.server.http.api_error import ApiError
from vllm_omni.entrypoints.server.http.client import while_connected
from vllm_omni.entrypoints.server.http.form_body import form_schema, read_form
from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.entrypoints.server.schemas.voices import VoiceBody
from vllm_omni.media.reference_sound import read_reference
from vllm_omni.voices import VoiceFacts, VoiceStore

router = APIRouter()
SAMPLE = "audio_sample"
FILE_FIELDS = {SAMPLE: SAMPLE}
NO_STORE = "no stage of it keeps voices (its config has no `voices`); a GET lists those that are there"
ModelName = Annotated[str | None, Query(max_length=512)]


@router.get("/v1/audio/voices", tags=["audio"])
async def list_voices(call: CallOf, model: ModelName = None) -> dict[str, Any]:
    """The voices of one model, or of all, and what is known of those that callers added."""
    asked = [each for each in _asked(call, model) if each.abilities.audios]
    return await asyncio.to_thread(_listed, asked)


@router.post("/v1/audio/voices", tags=["audio"], openapi_extra=form_schema(VoiceBody, FILE_FIELDS))
async def add_voice(call: CallOf, request: Request) -> dict[str, Any]:
    """Keeps a voice, which then may be named like the others."""
    body, files = await read_form(request, VoiceBody, FILE_FIELDS)
    samples = files.get(SAMPLE, [])
    if len(samples) != 1:
        raise ApiError(
            400, f"{SAMPLE}: got {len(samples)} files, expected one", code="missing_required_parameter", param=SAMPLE
        )
    model, store = _with_store(call, body.model)
    return await while_connected(request, asyncio.to_thread(_added, model, store, body, samples[0]))


@router.delete("/v1/audio/voices/{name}", tags=["audio"])
async def remove_voice(call: CallOf, name: Annotated[str, Path(max_length=512)], model: ModelName = None) -> Any:
    """Deletes a voice that a caller added."""
    served, store = _with_store(call, model)
    if name not in await asyncio.to_thread(store.names):
        is_own = name.lower() in map(str.lower, served.abilities.own_voices)
        words = "it belongs to the checkpoint" if is_own else "there is none of that name"
        raise ApiError(404, f"name: got {name!r:.80}; {words}", code="voice_not_found", param="name")
    await asyncio.to_thread(store.remove, name)
    return {"id": name, "name": name, "object": "audio.voice.deleted", "deleted": True}


def _listed(models: list[ServedModel]) -> dict[str, Any]:
    by_model = {model.name: list(model.abilities.voices) for model in models}
    stores = [store for model in models if (store := model.abilities.kept_voices) is not None]
    kept = {facts.name: _described(facts) for store in stores for facts in store.facts()}
    voices = dict.fromkeys(voice for names in by_model.values() for voice in names)
    return {"voices": list(voices), "uploaded_voices": list(kept.values()), "models": by_model}


def _added(model: ServedModel, store: VoiceStore, body: VoiceBody, sample: bytes) -> dict[str, Any]:
    if body.name.lower() in map(str.lower, model.abilities.own_voices):
        words = f"name: got {body.name!r}, which is a voice of the checkpoint; choose another"
        raise ApiError(400, words, code="invalid_value", param="name")
    sound = read_reference(sample, limits=model.config.limits, name=SAMPLE)
    return _described(store.add(body.name, sound, text=body.text, consent=body.consent))


def _described(facts: VoiceFacts) -> dict[str, Any]:
    """OpenAI's fields, then vllm-omni's."""
    return {
        "id": facts.name,
        "object": "audio.voice",
        "created_at": facts.created,
        "name": facts.name,
        "type": SAMPLE,
        "consent": facts.consent,
        "ref_text": facts.text,
        "duration_s": round(facts.duration_s, 3),
        "file_size": facts.num_bytes,
    }


def _asked(call: Call, name: str | None) -> list[ServedModel]:
    return list(call.parts.models) if name is None else [call.parts.models.find(name)]


def _with_store(call: Call, name: str | None) -> tuple[ServedModel, VoiceStore]:
    """The model that is named, else the first that keeps voices; ApiError 400 where it keeps none."""
    asked = _asked(call, name)
    for model in asked:
        if model.abilities.kept_voices is not None:
            return model, model.abilities.kept_voices
    raise ApiError(400, f"model: {asked[0].name!r}: {NO_STORE}", code="unsupported_by_model", param="model")
