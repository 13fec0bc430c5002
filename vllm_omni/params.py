"""Per-request parameters: SamplingParams for AR stages, DiffusionParams for DiT stages.

`None` alone means unset: the stage's `defaults` of the YAML, then the documented fallback, apply. Constructing
checks types and ranges that hold everywhere; limits that a config may raise (sizes, steps, tokens) are checked by
the stage that runs the request.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_omni.errors import InvalidRequestError
from vllm_omni.lora import LoRA, checked_loras
from vllm_omni.utils.checks import brief, did_you_mean
from vllm_omni.utils.plain import as_dict, as_list, as_number

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SEED = 2**63 - 1
MAX_PREVIEWS = 10
MIN_FPS = 1.0  # of a video
MAX_FPS = 240.0
VIDEO_FIELDS = ("num_frames", "fps")  # of DiffusionParams; only a stage that makes videos reads them
MAX_DRAWN_SEED = 2**32 - 1  # what is drawn for a request; every reader of files and JSON holds it
MAX_ITEMS = 10_000  # of a list or mapping among the parameters
MAX_STOP_CHARS = 10_000  # of all stop strings together
P = TypeVar("P", bound="StageParams")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageParams:
    """Base of the parameters of one stage; a custom stage kind subclasses it."""

    def with_defaults(self: P, defaults: Mapping[str, Any]) -> P:
        """A copy in which every unset field takes the stage's default."""
        known = {f.name for f in dataclasses.fields(self)}
        for name in defaults:
            if name not in known:
                raise InvalidRequestError(
                    f"defaults.{name}: unknown {type(self).__name__} field{did_you_mean(name, known)}"
                )
        unset = {k: v for k, v in defaults.items() if getattr(self, k) is None}
        return dataclasses.replace(self, **unset) if unset else self


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams(StageParams):
    """How an AR stage samples. What is None is the stage's default, else the value in brackets."""

    temperature: float | None = None  # (1.0) 0 is greedy
    top_p: float | None = None  # (1.0)
    top_k: int | None = None  # (off)
    min_p: float | None = None  # (0)
    repetition_penalty: float | None = None  # (1.0) 0.01 to 100; > 1 discourages what stands in prompt or output
    presence_penalty: float | None = None  # (0) over the output alone
    frequency_penalty: float | None = None  # (0) over the output alone
    max_tokens: int | None = None  # (16384, cut to the model's length)
    min_tokens: int | None = None  # (0)
    stop: str | Sequence[str] | None = None  # strings that end the text and are left out of it
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool | None = None  # (False)
    seed: int | None = None  # (one that is drawn for the request, see OmniOutput.seed)
    n: int | None = None  # (1) samples
    logprobs: int | None = None  # (off) alternatives per token; 0 gives the chosen token's alone
    logit_bias: Mapping[int, float] | None = None  # token id -> what is added to its logit
    skip_special_tokens: bool | None = None  # (True)
    # (none) adapters that act together: LoRA objects, or mappings of name (or path) and scale
    lora: Sequence[LoRA] | None = None

    def __post_init__(self) -> None:
        _check_numbers(self, _SAMPLING_RANGES)
        _check_bools(self, ("ignore_eos", "skip_special_tokens"))
        _check_loras(self)
        if self.stop is not None:
            object.__setattr__(self, "stop", _checked_stop(self.stop))
        if self.stop_token_ids is not None:
            object.__setattr__(self, "stop_token_ids", _checked_token_ids(self.stop_token_ids))
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionParams(StageParams):
    """How a DiT stage denoises. What is None is the stage's default, then the model's, else the value in brackets."""

    height: int | None = None  # pixels (the model's own size)
    width: int | None = None  # pixels (the model's own size)
    num_inference_steps: int | None = None  # (50)
    guidance_scale: float | None = None  # the model's formula decides which value is neutral: 0 for Z-Image, else 1
    # (0, 1) from which share of the steps to which guidance acts; outside of it one branch runs
    guidance_interval: Sequence[float] | None = None
    negative_prompt: str | None = None  # ("")
    seed: int | None = None  # (one that is drawn for the request, see OmniOutput.seed)
    num_outputs: int | None = None  # (1) samples
    num_previews: int | None = None  # (0) pictures of each running sample, for who streams
    # how far a picture may leave `image`: 1 ignores it, and where it leaves no step to compute it is refused (the
    # model's own: mostly 0.6, with a mask 1)
    strength: float | None = None
    # what a picture starts from, or edits: a PIL image, a path, bytes, an array, or a list of them
    image: Image | Sequence[Image] | None = None
    mask: Image | None = None  # of the image's size; what is white, or transparent, is drawn anew, the rest is kept
    sigmas: Sequence[float] | None = None  # one per step, descending, in (0, 1]
    output_type: str | None = None  # ("pil") or "latent"
    duration_s: float | None = None  # of the audio
    num_frames: int | None = None  # of the video (the model's own)
    fps: float | None = None  # frames per second of the video (the model's own)
    # the model's own: Z-Image knows `cfg_normalization` and `cfg_truncation`; ACE-Step `shift`, `cfg_interval_start`,
    # `cfg_interval_end` and `normalize`
    extra: Mapping[str, Any] | None = field(default=None)
    # (none) adapters that act together: LoRA objects, or mappings of name (or path) and scale
    lora: Sequence[LoRA] | None = None

    def __post_init__(self) -> None:
        _check_numbers(self, _DIFFUSION_RANGES)
        _check_loras(self)
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise InvalidRequestError(f"negative_prompt: got {type(self.negative_prompt).__name__}, expected a string")
        if self.output_type is not None and not (
            isinstance(self.output_type, str) and self.output_type in ("pil", "latent")
        ):
            raise InvalidRequestError(f"output_type: got {brief(self.output_type)}, expected 'pil' or 'latent'")
        if self.sigmas is not None:
            object.__setattr__(self, "sigmas", _checked_sigmas(self.sigmas))
        if self.guidance_interval is not None:
            object.__setattr__(self, "guidance_interval", _checked_interval(self.guidance_interval))
        if self.extra is not None:
            object.__setattr__(self, "extra", _checked_extra(self.extra))

    def with_defaults(self, defaults: Mapping[str, Any]) -> DiffusionParams:
        """As of every params class; of `extra`, each key that is not given takes its default. Defaults that say in
        another way what is given (`sigmas` and the number of steps) do not apply.
        """
        defaults = _without_other_schedules(self, defaults)
        filled = StageParams.with_defaults(self, defaults)
        if self.extra is None or defaults.get("extra") is None:
            return filled
        return dataclasses.replace(filled, extra={**defaults["extra"], **self.extra})


def draw_seed() -> int:
    """A fresh one."""
    return secrets.randbelow(MAX_DRAWN_SEED + 1)


def sample_seed(seed: int, index: int) -> int:
    """What sample `index` of a request draws from; given as its seed, it makes this sample alone."""
    return (seed + index) % (MAX_SEED + 1)


# each says how the noise falls; a request that names one leaves the defaults of the others aside
SCHEDULE_FIELDS = ("num_inference_steps", "sigmas")
SCHEDULE_EXTRA = ("timesteps", "shift")


def layered(above: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of DiffusionParams from two places, `above` first."""
    filled = DiffusionParams(**above).with_defaults(below)
    return {f.name: value for f in dataclasses.fields(filled) if (value := getattr(filled, f.name)) is not None}


def _without_other_schedules(params: DiffusionParams, defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    extra, below = params.extra or {}, defaults.get("extra") or {}
    has_list = params.sigmas is not None or extra.get("timesteps") is not None
    given = {name for name in SCHEDULE_FIELDS if getattr(params, name) is not None}
    given |= {name for name in SCHEDULE_EXTRA if extra.get(name) is not None}
    if not given:
        return defaults
    fields = SCHEDULE_FIELDS if has_list else ("sigmas",)
    keys = SCHEDULE_EXTRA if has_list else ("timesteps",)
    kept = {name: value for name, value in defaults.items() if name in given or name not in fields}
    if below:
        kept["extra"] = {key: value for key, value in below.items() if key in given or key not in keys}
    return kept


_SAMPLING_RANGES: dict[str, dict[str, Any]] = {
    "temperature": {"low": 0, "high": 100},
    "top_p": {"low": 0, "high": 1, "above_low": True},
    "top_k": {"low": 0, "integer": True},
    "min_p": {"low": 0, "high": 1},
    "repetition_penalty": {"low": 0.01, "high": 100},
    "presence_penalty": {"low": -100, "high": 100},
    "frequency_penalty": {"low": -100, "high": 100},
    "max_tokens": {"low": 1, "integer": True},
    "min_tokens": {"low": 0, "integer": True},
    "seed": {"low": 0, "high": MAX_SEED, "integer": True},
    "n": {"low": 1, "integer": True},
    "logprobs": {"low": 0, "high": 100, "integer": True},
}
_DIFFUSION_RANGES: dict[str, dict[str, Any]] = {
    "height": {"low": 1, "integer": True},
    "width": {"low": 1, "integer": True},
    "num_inference_steps": {"low": 1, "integer": True},
    "guidance_scale": {"low": 0},
    "seed": {"low": 0, "high": MAX_SEED, "integer": True},
    "num_outputs": {"low": 1, "integer": True},
    "num_previews": {"low": 0, "high": MAX_PREVIEWS, "integer": True},
    "strength": {"low": 0, "high": 1},
    "duration_s": {"low": 0, "above_low": True},
    "num_frames": {"low": 1, "integer": True},
    "fps": {"low": MIN_FPS, "high": MAX_FPS},
}


def _check_numbers(params: StageParams, ranges: Mapping[str, Mapping[str, Any]]) -> None:
    for name, limits in ranges.items():
        value = getattr(params, name)
        if value is not None:
            object.__setattr__(params, name, as_number(name, value, **limits, raises=InvalidRequestError))


def _check_bools(params: StageParams, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(params, name)
        if value is not None and not isinstance(value, bool):
            raise InvalidRequestError(f"{name}: got {brief(value)}, expected true or false")


def _check_loras(params: SamplingParams | DiffusionParams) -> None:
    if params.lora is not None:
        object.__setattr__(params, "lora", checked_loras(params.lora))


def _checked_stop(stop: object) -> tuple[str, ...]:
    expected = "a non-empty string, or a list of them"
    given = (
        [stop]
        if isinstance(stop, str)
        else as_list("stop", stop, MAX_ITEMS, raises=InvalidRequestError, expected=expected)
    )
    if not all(isinstance(item, str) and item for item in given):
        raise InvalidRequestError(f"stop: got {brief(given)}, expected {expected}")
    count = sum(map(len, given))
    if count > MAX_STOP_CHARS:
        raise InvalidRequestError(f"stop: got {count} characters in all, expected at most {MAX_STOP_CHARS}")
    return tuple(str(item) for item in given)


def _checked_token_ids(token_ids: object) -> tuple[int, ...]:
    given = as_list("stop_token_ids", token_ids, MAX_ITEMS, raises=InvalidRequestError, expected="a list of token ids")
    return tuple(as_number("stop_token_ids", token, 0, integer=True, raises=InvalidRequestError) for token in given)


def _checked_bias(bias: object) -> dict[int, float]:
    expected = "a mapping of token ids to numbers"
    given = as_dict("logit_bias", bias, MAX_ITEMS, raises=InvalidRequestError, expected=expected)
    found: dict[int, float] = {}
    for token, value in given.items():
        token_id = as_number("logit_bias", token, 0, integer=True, raises=InvalidRequestError)
        found[token_id] = as_number(f"logit_bias[{token_id}]", value, -1e9, 1e9, raises=InvalidRequestError)
    return found


def _checked_sigmas(sigmas: object) -> tuple[float, ...]:
    expected = "a descending list of numbers in (0, 1]"
    given = as_list("sigmas", sigmas, MAX_ITEMS, raises=InvalidRequestError, expected=expected)
    numbers = [
        float(as_number(f"sigmas[{index}]", sigma, 0, 1, above_low=True, raises=InvalidRequestError))
        for index, sigma in enumerate(given)
    ]
    if not numbers or any(a <= b for a, b in zip(numbers, numbers[1:], strict=False)):
        raise InvalidRequestError(f"sigmas: got {brief(numbers)}, expected {expected}")
    return tuple(numbers)


def _checked_interval(interval: object) -> tuple[float, float]:
    name, expected = "guidance_interval", "two numbers, 0 <= start < end <= 1"
    given = as_list(name, interval, MAX_ITEMS, raises=InvalidRequestError, expected=expected)
    if len(given) != 2:
        raise InvalidRequestError(f"{name}: got {brief(given)}, expected {expected}")
    start, end = (
        float(as_number(f"{name}[{index}]", share, 0, 1, raises=InvalidRequestError))
        for index, share in enumerate(given)
    )
    if start >= end:
        raise InvalidRequestError(f"{name}: got {brief([start, end])}, expected {expected}")
    return start, end


def _checked_extra(extra: object) -> dict[str, Any]:
    given = as_dict("extra", extra, MAX_ITEMS, raises=InvalidRequestError, expected="a mapping of names to values")
    for key in given:
        if not isinstance(key, str):
            raise InvalidRequestError(f"extra: got the key {brief(key)}, expected a name")
    return given
