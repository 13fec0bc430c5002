"""From the body of a request to an OmniRequest: which stage gets which parameters, and what the graph cannot honour."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_omni.engine.lora import loras_of, without_loras
from vllm_omni.entrypoints.server.context import Call
from vllm_omni.entrypoints.server.http.api_error import ApiError, unsupported
from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.entrypoints.server.requests.abilities import Abilities
from vllm_omni.entrypoints.server.requests.media_fetch import read_source
from vllm_omni.entrypoints.server.schemas.base import Body
from vllm_omni.entrypoints.server.settings import ServerSettings
from vllm_omni.params import DiffusionParams, SamplingParams, StageParams
from vllm_omni.request import PROMPT_KEYS, OmniRequest
from vllm_omni.utils.checks import brief, did_you_mean

OF_PICTURES = (
    *("width", "height", "image", "mask", "strength", "num_previews", "negative_prompt"),
    *("guidance_scale", "guidance_interval"),
)


def build_request(
    call: Call,
    model: ServedModel,
    body: Body,
    prompt: Mapping[str, Any],
    outputs: Sequence[str],
    *,
    sampling: SamplingParams | None = None,
    diffusion: DiffusionParams | None = None,
    extra: Mapping[str, Any] | None = None,
) -> OmniRequest:
    """outputs: the stages that are wanted. diffusion goes to those of them that diffuse, sampling to the sampler.
    extra: the body's `extra_params`. ApiError 400 for what no stage takes.
    """
    keys, rest = _sorted_extra(model.abilities, extra or {})
    if diffusion is not None and rest:
        diffusion = dataclasses.replace(diffusion, extra=rest)
    params = {
        **_for_stages(_sampler(model.abilities), sampling),
        **_for_diffusers(model.abilities, outputs, diffusion),
    }
    params = _with_loras_where_taken(model.abilities, params)
    _check_priority(model, body.priority)
    timeout_s = call.timeout_s(body.timeout)
    own = {"request_id": call.run_id, "outputs": list(outputs), "timeout_s": timeout_s, "priority": body.priority}
    return OmniRequest.from_prompt({**prompt, **keys, **own}, params)


def _check_priority(model: ServedModel, priority: str | None) -> None:
    known = model.config.scheduler.priority_weights
    if priority is not None and priority not in known:
        words = f"priority: got {priority!r:.80}{did_you_mean(priority[:80], known)}"
        raise ApiError(400, words, code="invalid_value", param="priority")


def require(model: ServedModel, kind: str, stages: Sequence[str]) -> Sequence[str]:
    """The stages that make `kind`; ApiError 400 where there is none."""
    if not stages:
        made = ", ".join(model.abilities.makes) or "nothing"
        raise ApiError(
            400, f"model: {model.name!r} makes {made}, not {kind}", code="unsupported_by_model", param="model"
        )
    return stages


def voice_key(model: ServedModel, voice: str | None) -> dict[str, str]:
    """The voice as the key of a prompt. The model's default for None, `default` and `alloy`, which clients send that
    know no other.
    """
    voices = model.abilities.voices
    if voice is None or (voice in ("default", "alloy") and voice not in voices):
        return {}
    if not voices or model.abilities.voice_key is None:
        raise unsupported("voice", f"got {voice!r:.80}, but this model has no voices to choose from; leave it out")
    found = {name.lower(): name for name in voices}.get(voice.lower())
    if found is None:
        raise ApiError(
            400, f"voice: got {voice!r:.80}{did_you_mean(voice[:80], voices)}", code="invalid_value", param="voice"
        )
    return {model.abilities.voice_key: found}


async def graph_keys(model: ServedModel, given: Mapping[str, Any], settings: ServerSettings) -> dict[str, Any]:
    """Fields of a body that only some graphs read, as keys of a prompt: files as their bytes, never as paths. ApiError
    400 for the first that this one does not read.
    """
    able = model.abilities
    for key in given:
        if key in PROMPT_KEYS or key not in able.request_keys:
            raise unsupported(key[:80], "no stage of this model reads it; leave it out")
    return {key: await _graph_value(key, value, able, settings) for key, value in given.items()}


async def _graph_value(key: str, value: Any, able: Abilities, settings: ServerSettings) -> Any:
    if key not in able.media_keys:
        return value
    if not isinstance(value, str):
        raise ApiError(
            400, f"{key}: got {brief(value)}, expected a data URI or base64", code="invalid_media", param=key
        )
    return await asyncio.to_thread(read_source, value, key, settings)


def _for_stages(stages: Sequence[str], params: StageParams | None) -> dict[str, StageParams]:
    """Parameters by stage; ApiError 400 where some are set and no stage is there to take them."""
    given = (
        [] if params is None else [f.name for f in dataclasses.fields(params) if getattr(params, f.name) is not None]
    )
    if params is None or not given:
        return {}
    if not stages:
        raise unsupported(given[0], "no stage of this model reads it; leave it out")
    return dict.fromkeys(stages, params)


def _for_diffusers(
    abilities: Abilities, outputs: Sequence[str], params: DiffusionParams | None
) -> dict[str, StageParams]:
    """As `_for_stages`; what says something of pictures goes to the stages alone that make them."""
    stages = [stage for stage in outputs if issubclass(abilities.params_types.get(stage, StageParams), DiffusionParams)]
    pictures = [stage for stage in stages if stage in abilities.images]
    if params is not None and not stages and abilities.sampler is not None:
        params = dataclasses.replace(params, seed=None)  # it is the sampler's, too
    if params is None or len(pictures) in (0, len(stages)):
        return _for_stages(stages, params)
    bare = dataclasses.replace(params, **dict.fromkeys(OF_PICTURES, None))
    return {**_for_stages(stages, bare), **_for_stages(pictures, params)}


def _with_loras_where_taken(abilities: Abilities, params: Mapping[str, StageParams]) -> dict[str, StageParams]:
    """Adapters stay with the stages alone that take some; ApiError 400 where none does."""
    named = {stage for stage, each in params.items() if loras_of(each)}
    if named and not named & abilities.adapted:
        raise unsupported("lora", "no stage of this model takes adapters; leave it out")
    bare = named - abilities.adapted
    return {stage: without_loras(each) if stage in bare else each for stage, each in params.items()}


def _sampler(abilities: Abilities) -> tuple[str, ...]:
    return () if abilities.sampler is None else (abilities.sampler,)


def _sorted_extra(abilities: Abilities, extra: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`extra_params`: keys that a stage reads beside the prompt, and the rest, which is the diffusion model's own."""
    for key in extra:
        if key in PROMPT_KEYS:
            raise unsupported(f"extra_params.{key}", "is a field of its own, or not the caller's to set")
        if key in abilities.media_keys:  # a stage would open what a path names
            raise unsupported(f"extra_params.{key}", "holds a file; it is a field of /v1/audio/generate")
    keys = {key: value for key, value in extra.items() if key in abilities.request_keys}
    return keys, {key: value for key, value in extra.items() if key not in keys}
