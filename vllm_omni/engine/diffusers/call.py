"""A request into the keyword arguments of a diffusers pipeline, by its signature. Nothing is dropped: what is set and
what the pipeline does not take is refused.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.engine.diffusers.pipeline_class import shown_frame_rate
from vllm_omni.engine.diffusers.pipeline_inputs import (
    MediaFormat,
    check_media,
    check_pictures,
    check_value,
    is_picture,
    is_sound,
    read_pictures,
    read_sounds,
)
from vllm_omni.engine.diffusion.checks import PARAM_KEYS, check_counts, check_previews, with_fields
from vllm_omni.errors import InvalidRequestError
from vllm_omni.params import MAX_SEED, DiffusionParams
from vllm_omni.request import OmniRequest
from vllm_omni.utils.checks import brief, did_you_mean
from vllm_omni.worker.background import Stop
from vllm_omni.worker.diffusion.diffusion_model import check_limit

# field -> what pipelines call it; the first that a signature has is meant
NAMES: dict[str, tuple[str, ...]] = {
    "height": ("height",),
    "width": ("width",),
    "num_inference_steps": ("num_inference_steps",),
    "guidance_scale": ("guidance_scale",),
    "guidance_interval": ("guidance_interval",),
    "negative_prompt": ("negative_prompt",),
    "seed": ("generator",),
    "num_outputs": ("num_images_per_prompt", "num_waveforms_per_prompt", "num_videos_per_prompt", "batch_size"),
    "strength": ("strength",),
    "image": ("image", "images", "input_images"),
    "mask": ("mask_image", "mask"),
    "sigmas": ("sigmas",),
    "num_frames": ("num_frames", "video_length"),
    "fps": ("frame_rate", "fps", "target_fps"),
    "duration_s": ("audio_end_in_s", "audio_length_in_s", "audio_duration", "audio_duration_s", "duration"),
}
RESERVED = frozenset({"self", "prompt", "return_dict", "output_type"})
AUDIO_START = "audio_start_in_s"
DEFAULT_FPS = 10.0  # where nothing says another one; that of the functions of diffusers that save frames
FRAMES_AS_TENSORS = "pt"  # without a detour through floats of double size, and pictures of each
_ONE_AT_A_TIME = re.compile(r"^ {8}num_\w+_per_prompt = 1$", re.MULTILINE)  # whatever the signature promises
FLOOR_OF_STRENGTH = "int(num_inference_steps * strength)"  # how most pipelines count the steps that are left


class PipelineCall:
    """How requests become calls of one pipeline class. output: what the stage gives, None where that is not
    known.
    """

    def __init__(
        self, pipeline_class: type, output: str | None, limits: LimitsConfig, form: MediaFormat | None = None
    ) -> None:
        self.name = pipeline_class.__name__
        self._output = output
        self._limits = limits
        self._form = form or MediaFormat()
        parameters = inspect.signature(pipeline_class.__call__).parameters
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self._defaults = {name: each.default for name, each in parameters.items() if each.kind in kinds}
        self._targets = {
            field: next((name for name in names if name in self._defaults), None) for field, names in NAMES.items()
        }
        free = self._defaults.keys() - RESERVED - set(self._targets.values()) - {"generator"}
        self._extra_keys = sorted(name for name in free if "callback" not in name)
        self._makes_one = _ONE_AT_A_TIME.search(_source(pipeline_class.__call__)) is not None
        self._shown_rate = shown_frame_rate(pipeline_class)
        self._floors_strength = FLOOR_OF_STRENGTH in _source(getattr(pipeline_class, "get_timesteps", None))
        own = [field for field in PARAM_KEYS if self._targets[field] is not None]
        media = [name for name in self._extra_keys if is_picture(name) or is_sound(name)]
        self.request_keys = frozenset({*own, *media})
        self.media_keys = self.request_keys & {"image", "mask", *media}

    @property
    def takes_seed(self) -> bool:
        return self._targets["seed"] is not None

    def num_steps(self, params: DiffusionParams) -> int:
        """Denoising steps, the pipeline's own number where the request names none; 1 where it counts none."""
        if params.sigmas is not None:
            return len(params.sigmas)
        default = self._defaults.get("num_inference_steps", 1)
        default = default if isinstance(default, int) else 1
        return default if params.num_inference_steps is None else params.num_inference_steps

    def fps(self, params: DiffusionParams) -> float:
        """Frames per second of the video: those of the request, the pipeline's default, those of its documentation."""
        own = self._default("fps")
        return float(params.fps or own or self._shown_rate or DEFAULT_FPS)

    def job_size(self, params: DiffusionParams) -> float:
        """Steps times outputs, times the megapixels (of all frames) or seconds of each where they are given."""
        size = params.duration_s or (params.height or 1024) * (params.width or 1024) * 1e-6
        if self._output == "video":
            size *= params.num_frames or self._default("num_frames") or 1
        return float(self.num_steps(params) * (params.num_outputs or 1) * size)

    def with_fields(self, request: OmniRequest, params: DiffusionParams, given: DiffusionParams) -> DiffusionParams:
        """The parameters with what the prompt's dict says beside them, which stands above defaults. given: those of the
        request, without defaults. InvalidRequestError for what both say.
        """
        params = with_fields(request, params, given, self.request_keys)
        extra = {
            key: request.fields[key] for key in self.request_keys - PARAM_KEYS if request.fields.get(key) is not None
        }
        for key in extra:
            if (given.extra or {}).get(key) is not None:
                raise InvalidRequestError(f"prompt[{key!r}]: the parameters say it too; give it once")
        return dataclasses.replace(params, extra={**(params.extra or {}), **extra}) if extra else params

    def check(self, request: OmniRequest, params: DiffusionParams, reads_prompt: bool) -> None:
        """Raises InvalidRequestError for what the pipeline does not take or the limits do not allow."""
        prompt = request.prompt if reads_prompt else ""
        if not isinstance(prompt, str):
            raise InvalidRequestError(f"prompt: got {type(prompt).__name__}, expected a string for {self.name}")
        self._check_sizes(params)
        self._check_strength(params)
        self._check_extra(params.extra or {})
        self._named(prompt, request, params)

    def arguments(
        self,
        prompt: str,
        request: OmniRequest,
        params: DiffusionParams,
        generators: Sequence[torch.Generator],
        stop: Stop,
    ) -> dict[str, Any]:
        """The keyword arguments of one call, pictures and sounds read. Those that the request leaves unset are left to
        the pipeline's own defaults. stop: raises where nobody wants them any more.
        """
        named = self._named(prompt, request, params)
        arguments = {name: self._read(name, value, stop) for name, value in named.items()}
        if arguments.get("audio_end_in_s") is not None:
            arguments["audio_end_in_s"] += arguments.get(AUDIO_START) or 0.0
        if "initial_audio_waveforms" in arguments:
            arguments.setdefault("initial_audio_sampling_rate", self._form.rate)
        if self._output != "audio" and "output_type" in self._defaults:
            arguments["output_type"] = FRAMES_AS_TENSORS if self._output == "video" else "pil"
        if self._targets["seed"] is not None:
            arguments["generator"] = list(generators) if len(generators) > 1 else generators[0]
        return arguments

    def _named(self, prompt: str, request: OmniRequest, params: DiffusionParams) -> dict[str, Any]:
        """What the request sets, by the pipeline's own names; nothing is read or converted."""
        arguments = {**(params.extra or {}), **self._prompts(prompt, request, params)}
        for field, target in self._targets.items():
            value = getattr(params, field)
            if field in ("seed", "negative_prompt") or value is None or (field == "num_outputs" and value == 1):
                continue
            if target is None and field == "fps" and self._output == "video":  # it is the file's alone
                continue
            if target is None:
                raise self._not_taken(field, NAMES[field])
            arguments[target] = list(value) if field == "sigmas" else value
        return arguments

    def _read(self, name: str, value: Any, stop: Stop) -> Any:
        if is_picture(name) and not isinstance(value, (bool, int, float)) and value is not None:
            return read_pictures(name, value, self._form, self._limits, stop)
        return read_sounds(name, value, self._form, self._limits, stop) if is_sound(name) else value

    def _prompts(self, prompt: str, request: OmniRequest, params: DiffusionParams) -> dict[str, str]:
        negative = params.negative_prompt if params.negative_prompt is not None else request.negative_prompt
        given = {"prompt": prompt, "negative_prompt": negative}
        arguments = {}
        for name, text in given.items():
            if text is None or (not text and name not in self._defaults):
                continue
            if name not in self._defaults:
                raise self._not_taken(name, (name,))
            most = self._limits.max_prompt_chars
            if len(text) > most:
                raise InvalidRequestError(
                    f"{name}: got {len(text)} characters, expected at most {most}; "
                    "shorten it, or raise limits.max_prompt_chars"
                )
            arguments[name] = text
        return arguments

    def _check_sizes(self, params: DiffusionParams) -> None:
        limits = self._limits
        check_counts(params, self.num_steps(params), limits)
        check_previews(params, gives_previews=False)
        if self._makes_one and (params.num_outputs or 1) > 1:
            raise InvalidRequestError(
                f"num_outputs: got {params.num_outputs}, but {self.name} makes one at a time; send a request for each"
            )
        if params.output_type == "latent":
            raise InvalidRequestError("output_type: got 'latent', expected 'pil'; a hosted pipeline gives no latents")
        if params.guidance_scale is not None:
            check_limit("guidance_scale", params.guidance_scale, 0, limits.max_guidance_scale)
        if params.duration_s is not None:
            check_limit("duration_s", params.duration_s, 0, limits.max_duration_s)
        sides = (params.height or params.width, params.width or params.height)
        if sides[0] is not None and sides[1] is not None:
            check_limit("height * width", sides[0] * sides[1], 1, limits.max_pixels, integer=True)
        if self._output == "video":
            self._check_frames(params)
        for name in ("image", "mask"):
            if getattr(params, name) is not None:
                check_pictures(name, getattr(params, name), self._form, limits)

    def _check_frames(self, params: DiffusionParams) -> None:
        """What the request leaves unset counts with the pipeline's own default, where the signature says one."""
        num_frames, height, width = (
            getattr(params, name) or self._default(name) for name in ("num_frames", "height", "width")
        )
        if num_frames is not None:
            check_limit("num_frames", num_frames, 1, self._limits.max_frames, integer=True)
        if num_frames is not None and height is not None and width is not None:
            total = (params.num_outputs or 1) * num_frames * height * width
            name = "num_outputs * num_frames * height * width"
            check_limit(name, total, 1, self._limits.max_total_pixels)

    def _default(self, field: str) -> float | None:
        """The pipeline's own default of a number, by our name; None where its signature has none."""
        value = self._defaults.get(self._targets[field] or "")
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    def _check_strength(self, params: DiffusionParams) -> None:
        default = self._defaults.get("strength")
        strength = params.strength if params.strength is not None else default
        if self._targets["strength"] is None or not isinstance(strength, (int, float)):
            return
        num_steps = self.num_steps(params)
        left = int(num_steps * strength) if self._floors_strength else num_steps * strength
        if left <= 0:
            raise InvalidRequestError(
                f"strength: got {strength:g}, which leaves none of {num_steps} steps; expected at least"
                f" {1 / num_steps:.3g}, or more steps"
            )

    def _check_extra(self, extra: Mapping[str, Any]) -> None:
        for key, value in extra.items():
            field = next((field for field, target in self._targets.items() if key == target), None)
            if field is None and key not in self._extra_keys:
                field = next((field for field, names in NAMES.items() if key in names), None)
            if field is not None:
                raise InvalidRequestError(f"extra.{key}: got {brief(value)}; set the parameter {field} instead")
            if key not in self._extra_keys:
                raise InvalidRequestError(f"extra.{key}: unknown key{did_you_mean(str(key), self._extra_keys)}")
            self._check_extra_value(key, value)

    def _check_extra_value(self, key: str, value: object) -> None:
        """Numbers are finite; what multiplies the work has the limit of steps, or of guidance."""
        name, limits = f"extra.{key}", self._limits
        if (is_picture(key) or is_sound(key)) and value is not None and not isinstance(value, (bool, int, float)):
            check_media(name, key, value, self._form, limits)
            return
        check_value(name, value, self._form, limits)
        if key == "timesteps" and isinstance(value, list | tuple):
            check_limit("extra.timesteps: its length", len(value), 1, limits.max_inference_steps, integer=True)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        if key == AUDIO_START:
            check_limit(name, value, 0, limits.max_duration_s)
        elif "num_" in key:
            check_limit(name, value, 0, limits.max_inference_steps)
        elif key.endswith(("guidance_scale", "cfg_scale")):
            check_limit(name, value, -limits.max_guidance_scale, limits.max_guidance_scale)

    def _not_taken(self, field: str, names: tuple[str, ...]) -> InvalidRequestError:
        words = " or ".join(repr(name) for name in names)
        return InvalidRequestError(f"{field}: {self.name} does not take it (it has no {words}); leave it unset")


def request_generators(params: DiffusionParams) -> list[torch.Generator]:
    """Output i draws from seed + i, on the CPU, so that a seed means the same on every device."""
    seed = secrets.randbelow(MAX_SEED) if params.seed is None else params.seed
    seeds = [(seed + index) % (MAX_SEED + 1) for index in range(params.num_outputs or 1)]
    return [torch.Generator().manual_seed(each) for each in seeds]


def _source(function: Any) -> str:
    try:
        return inspect.getsource(inspect.unwrap(function)) if function is not None else ""
    except (OSError, TypeError):
        return ""
