"""What ACE-Step makes of DiffusionParams: steps, guidance, shift, loudness, and what it refuses. Knows no weights."""

from __future__ import annotations

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.params import DiffusionParams
from vllm_omni.utils.checks import check_number, did_you_mean
from vllm_omni.worker.diffusion.diffusion_model import check_limit
from vllm_omni.worker.diffusion.guidance import check_guidance_interval

DEFAULT_STEPS = 8  # of diffusers' pipeline, which is made for turbo models
DEFAULT_GUIDANCE = 7.0
DEFAULT_SHIFT = 3.0
TURBO_DEFAULTS = {"num_inference_steps": DEFAULT_STEPS}
BASE_DEFAULTS = {"num_inference_steps": 50, "guidance_scale": DEFAULT_GUIDANCE}  # as published for base and sft
MAX_SHIFT = 100.0
UNUSED_FIELDS = ("height", "width", "strength", "image")
EXTRA_KEYS = ("shift", "cfg_interval_start", "cfg_interval_end", "normalize")


def num_steps(params: DiffusionParams) -> int:
    """Denoising steps."""
    if params.sigmas is not None:
        return len(params.sigmas)
    return DEFAULT_STEPS if params.num_inference_steps is None else params.num_inference_steps


def guidance_scale(params: DiffusionParams, is_turbo: bool) -> float:
    """1 is neutral, and all that a turbo model can do."""
    if is_turbo:
        return 1.0
    return DEFAULT_GUIDANCE if params.guidance_scale is None else params.guidance_scale


def noise_interval(params: DiffusionParams) -> tuple[float, float]:
    """Guidance acts while 1 - timestep is within it: shares of the way from noise, not of the steps."""
    extra = params.extra or {}
    return float(extra.get("cfg_interval_start", 0.0)), float(extra.get("cfg_interval_end", 1.0))


def shift_of(params: DiffusionParams) -> float:
    """Of the noise levels; above 1 more steps are spent on noise."""
    return float((params.extra or {}).get("shift", DEFAULT_SHIFT))


def is_normalized(params: DiffusionParams) -> bool:
    """Whether the audio is brought to a fixed peak."""
    return bool((params.extra or {}).get("normalize", True))


def check_params(params: DiffusionParams, limits: LimitsConfig, is_turbo: bool) -> None:
    """InvalidRequestError for what the model would not read, cannot do, or must not do."""
    for name in UNUSED_FIELDS:
        if getattr(params, name) is not None:
            raise InvalidRequestError(f"{name}: ACE-Step turns text into music and does not read it; leave it unset")
    if params.output_type == "pil":
        raise InvalidRequestError("output_type: got 'pil', which is for pictures; leave it unset for sound")
    if params.duration_s is not None:
        check_limit("duration_s", params.duration_s, 0, limits.max_duration_s)
    _check_guidance(params, limits, is_turbo)
    _check_extra(params, is_turbo)


def _check_guidance(params: DiffusionParams, limits: LimitsConfig, is_turbo: bool) -> None:
    if is_turbo and params.guidance_scale is not None and params.guidance_scale > 1:
        raise InvalidRequestError(
            f"guidance_scale: got {params.guidance_scale:g}, but guidance is distilled into the weights of a turbo"
            " model; leave it out or set it to 1"
        )
    check_limit("guidance_scale", guidance_scale(params, is_turbo), 0, limits.max_guidance_scale)
    if is_turbo and params.guidance_interval is not None:
        raise InvalidRequestError(
            "guidance_interval: guidance is distilled into the weights of a turbo model; leave it out"
        )
    check_guidance_interval(params, num_steps(params))


def _check_extra(params: DiffusionParams, is_turbo: bool) -> None:
    extra = params.extra or {}
    for name, value in extra.items():
        if name not in EXTRA_KEYS:
            raise InvalidRequestError(f"extra.{name}: unknown key{did_you_mean(str(name), EXTRA_KEYS)}")
        _check_extra_value(name, value)
    start, end = noise_interval(params)
    if start > end:
        raise InvalidRequestError(
            f"extra.cfg_interval_start: got {start:g}, expected at most cfg_interval_end, {end:g}"
        )
    unguided = guidance_scale(params, is_turbo) <= 1
    for name in ("cfg_interval_start", "cfg_interval_end"):
        if name in extra and unguided:
            raise InvalidRequestError(f"extra.{name}: nothing reads it without guidance; leave it out")
        if name in extra and params.guidance_interval is not None:
            raise InvalidRequestError(f"extra.{name}: got it beside guidance_interval; leave one of the two out")
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
