"""What of a request and its parameters an ACE-Step stage reads: ports, ranges, refusals. Knows no weights.

`check_request` sees what the request says; the fields themselves (`lyrics`, `audio`, ...) are checked by the stage kind
`music_prompt`, which reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.params import DiffusionParams
from vllm_omni.request import OmniRequest
from vllm_omni.utils.checks import check_number, did_you_mean
from vllm_omni.worker.diffusion.diffusion_model import check_limit

DEFAULT_STEPS = 8
DEFAULT_GUIDANCE = 7.0
DEFAULT_SHIFT = 3.0
DEFAULT_DURATION_S = 60.0
MAX_SHIFT = 100.0
REFERENCE_SECONDS = 30
UNUSED_FIELDS = ("height", "width", "strength", "image")
EXTRA_KEYS = ("shift", "cfg_interval_start", "cfg_interval_end", "normalize")
TOKENIZER_PARTS = "audio_tokenizer and audio_token_detokenizer"


def num_steps(params: DiffusionParams) -> int:
    if params.sigmas is not None:
        return len(params.sigmas)
    return DEFAULT_STEPS if params.num_inference_steps is None else params.num_inference_steps


def guidance_scale(params: DiffusionParams, is_turbo: bool) -> float:
    """1 is neutral, and all that a turbo model can do."""
    if is_turbo:
        return 1.0
    return DEFAULT_GUIDANCE if params.guidance_scale is None else params.guidance_scale


def guidance_interval(params: DiffusionParams) -> tuple[float, float]:
    extra = params.extra or {}
    return float(extra.get("cfg_interval_start", 0.0)), float(extra.get("cfg_interval_end", 1.0))


def shift_of(params: DiffusionParams) -> float:
    return float((params.extra or {}).get("shift", DEFAULT_SHIFT))


def is_normalized(params: DiffusionParams) -> bool:
    return bool((params.extra or {}).get("normalize", True))


def cover_strength(music: Mapping[str, Any]) -> float:
    return float(music["audio_cover_strength"])


def needed_ports(fields: Mapping[str, Any]) -> frozenset[str]:
    """Words and `music` always. The sounds that the request brings. Audio codes for text to music and for a cover
    without a source sound: they are empty where the request brings none, and a language model's where one is connected.
    The plain prompt for a cover of strength below 1.
    """
    given = {name for name, value in fields.items() if value is not None}
    ports = {"prompt_embeds", "lyric_embeds", "music"}
    ports |= {port for field, port in (("audio", "source_audio"), ("reference_audio",) * 2) if field in given}
    if "audio" not in given and fields.get("task_type") != "repaint":
        ports.add("audio_codes")
    if _is_weakened(fields):
        ports.add("plain_prompt_embeds")
    return frozenset(ports)


def check_request(
    request: OmniRequest,
    params: DiffusionParams,
    connected: frozenset[str],
    limits: LimitsConfig,
    is_turbo: bool,
    can_tokenize: bool,
) -> None:
    """InvalidRequestError for what the model would not read, cannot do, or must not do."""
    for name in UNUSED_FIELDS:
        if getattr(params, name) is not None:
            raise InvalidRequestError(f"{name}: ACE-Step turns text into music and does not read it; leave it unset")
    if params.negative_prompt or request.negative_prompt:
        raise InvalidRequestError(
            "negative_prompt: ACE-Step guides away from a learned condition and does not read it; leave it out"
        )
    if params.output_type == "pil":
        raise InvalidRequestError("output_type: got 'pil', which is for pictures; leave it unset for sound")
    if params.duration_s is not None:
        check_limit("duration_s", params.duration_s, 0, limits.max_duration_s)
    _check_guidance(params, limits, is_turbo)
    _check_extra(params, is_turbo)
    _check_ports(request.fields, connected, can_tokenize)


def _check_guidance(params: DiffusionParams, limits: LimitsConfig, is_turbo: bool) -> None:
    if is_turbo and params.guidance_scale is not None and params.guidance_scale > 1:
        raise InvalidRequestError(
            f"guidance_scale: got {params.guidance_scale:g}, but guidance is distilled into the weights of a turbo"
            " model; leave it out or set it to 1"
        )
    check_limit("guidance_scale", guidance_scale(params, is_turbo), 0, limits.max_guidance_scale)


def _check_extra(params: DiffusionParams, is_turbo: bool) -> None:
    extra = params.extra or {}
    for name, value in extra.items():
        if name not in EXTRA_KEYS:
            raise InvalidRequestError(f"extra.{name}: unknown key{did_you_mean(str(name), EXTRA_KEYS)}")
        _check_extra_value(name, value)
    start, end = guidance_interval(params)
    if start > end:
        raise InvalidRequestError(
            f"extra.cfg_interval_start: got {start:g}, expected at most cfg_interval_end, {end:g}"
        )
    unguided = guidance_scale(params, is_turbo) <= 1
    for name in ("cfg_interval_start", "cfg_interval_end"):
        if name in extra and unguided:
            raise InvalidRequestError(f"extra.{name}: nothing reads it without guidance; leave it out")
    if "shift" in extra and params.sigmas is not None:
        raise InvalidRequestError(
            "extra.shift: got it beside sigmas, which it does not change; leave one of the two out"
        )


def _check_extra_value(name: str, value: object) -> None:
    if name == "normalize":
        if not isinstance(value, bool):
            raise InvalidRequestError(f"extra.normalize: got {value!r:.80}, expected true or false")
    elif name == "shift":
        check_number("extra.shift", value, 0, MAX_SHIFT, above_low=True, raises=InvalidRequestError)
    else:
        check_number(f"extra.{name}", value, 0, 1, raises=InvalidRequestError)


def _check_ports(fields: Mapping[str, Any], connected: frozenset[str], can_tokenize: bool) -> None:
    has_codes = fields.get("audio_codes") is not None
    is_cover = fields.get("task_type") == "cover" or has_codes
    if is_cover and not can_tokenize:
        raise InvalidRequestError(
            f"task_type: a cover needs {TOKENIZER_PARTS}, which the model's folder lacks; use a folder that has them"
        )
    if _is_weakened(fields) and "plain_prompt_embeds" not in connected:
        raise InvalidRequestError(
            f"audio_cover_strength: got {fields['audio_cover_strength']}, but the stage has no input"
            " plain_prompt_embeds; add the edge or leave it at 1"
        )


def _is_weakened(fields: Mapping[str, Any]) -> bool:
    """Whether a cover is asked for that follows its source less than wholly."""
    strength = fields.get("audio_cover_strength")
    return isinstance(strength, int | float) and strength < 1
