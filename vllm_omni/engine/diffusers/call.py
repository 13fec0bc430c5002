"""DiffusionParams into the keyword arguments of a diffusers pipeline, by its signature. Nothing is dropped: a parameter
that is set and that the pipeline does not take is refused.
"""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Mapping
from typing import Any

import torch

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.engine.diffusion.checks import check_counts, check_previews
from vllm_omni.errors import InvalidRequestError
from vllm_omni.params import MAX_SEED, DiffusionParams
from vllm_omni.request import OmniRequest
from vllm_omni.utils.checks import brief, check_number, did_you_mean
from vllm_omni.worker.diffusion.diffusion_model import check_limit

# field -> what pipelines call it; the first that a signature has is meant
NAMES: dict[str, tuple[str, ...]] = {
    "height": ("height",),
    "width": ("width",),
    "num_inference_steps": ("num_inference_steps",),
    "guidance_scale": ("guidance_scale",),
    "negative_prompt": ("negative_prompt",),
    "seed": ("generator",),
    "num_outputs": ("num_images_per_prompt", "num_waveforms_per_prompt", "batch_size"),
    "strength": ("strength",),
    "image": ("image",),
    "sigmas": ("sigmas",),
    "duration_s": ("audio_end_in_s", "audio_length_in_s", "audio_duration", "audio_duration_s", "duration"),
}
RESERVED = frozenset({"self", "prompt", "return_dict", "output_type"})
AUDIO_START = "audio_start_in_s"


class PipelineCall:
    """How requests become calls of one pipeline class. output: "image" or "audio"."""

    def __init__(self, pipeline_class: type, output: str, limits: LimitsConfig) -> None:
        self.name = pipeline_class.__name__
        self._output = output
        self._limits = limits
        parameters = inspect.signature(pipeline_class.__call__).parameters
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self._defaults = {name: each.default for name, each in parameters.items() if each.kind in kinds}
        self._targets = {
            field: next((name for name in names if name in self._defaults), None) for field, names in NAMES.items()
        }
        taken = {name for names in NAMES.values() for name in names}
        free = self._defaults.keys() - RESERVED - taken
        self._extra_keys = sorted(name for name in free if "callback" not in name)

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

    def job_size(self, params: DiffusionParams) -> float:
        """Steps times outputs, times the megapixels or seconds of each where they are given."""
        size = params.duration_s or (params.height or 1024) * (params.width or 1024) * 1e-6
        return float(self.num_steps(params) * (params.num_outputs or 1) * size)

    def check(self, request: OmniRequest, params: DiffusionParams, reads_prompt: bool) -> None:
        """Raises InvalidRequestError for what the pipeline does not take or the limits do not allow."""
        prompt = request.prompt if reads_prompt else ""
        if not isinstance(prompt, str):
            raise InvalidRequestError(f"prompt: got {type(prompt).__name__}, expected a string for {self.name}")
        self._check_sizes(params)
        self._check_extra(params.extra)
        self.arguments(prompt, request, params)

    def arguments(self, prompt: str, request: OmniRequest, params: DiffusionParams) -> dict[str, Any]:
        """The keyword arguments of one call, fresh generators among them. Those that the request leaves unset are left
        to the pipeline's own defaults.
        """
        arguments = {**(params.extra or {}), **self._prompts(prompt, request, params)}
        for field, target in self._targets.items():
            value = getattr(params, field)
            if field in ("seed", "negative_prompt") or value is None or (field == "num_outputs" and value == 1):
                continue
            if target is None:
                raise self._not_taken(field, NAMES[field])
            arguments[target] = value
        if arguments.get("audio_end_in_s") is not None:
            arguments["audio_end_in_s"] += arguments.get(AUDIO_START) or 0.0
        if params.sigmas is not None:
            arguments["sigmas"] = list(params.sigmas)
        if self._output == "image" and "output_type" in self._defaults:
            arguments["output_type"] = "pil"
        return arguments | self._generators(params)

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

    def _generators(self, params: DiffusionParams) -> dict[str, Any]:
        """Output i draws from seed + i, on the CPU, so that a seed means the same on every device."""
        if self._targets["seed"] is None:
            if params.seed is not None:
                raise self._not_taken("seed", NAMES["seed"])
            return {}
        seed = secrets.randbelow(MAX_SEED) if params.seed is None else params.seed
        seeds = [(seed + index) % (MAX_SEED + 1) for index in range(params.num_outputs or 1)]
        generators = [torch.Generator().manual_seed(each) for each in seeds]
        return {"generator": generators if len(generators) > 1 else generators[0]}

    def _check_sizes(self, params: DiffusionParams) -> None:
        limits = self._limits
        check_counts(params, self.num_steps(params), limits)
        check_previews(params, gives_previews=False)
        if params.output_type == "latent":
            raise InvalidRequestError("output_type: got 'latent', expected 'pil'; a hosted pipeline gives no latents")
        if params.guidance_scale is not None:
            check_limit("guidance_scale", params.guidance_scale, 0, limits.max_guidance_scale)
        if params.duration_s is not None:
            check_limit("duration_s", params.duration_s, 0, limits.max_duration_s)
        sides = (params.height or params.width, params.width or params.height)
        if sides[0] is not None and sides[1] is not None:
            check_limit("height * width", sides[0] * sides[1], 1, limits.max_pixels, integer=True)
        if params.image is not None:
            size = getattr(params.image, "size", None)
            if not isinstance(size, tuple) or len(size) != 2:
                raise InvalidRequestError(f"image: got {type(params.image).__name__}, expected a PIL.Image")
            check_limit("image: width * height", size[0] * size[1], 1, limits.max_pixels, integer=True)

    def _check_extra(self, extra: object) -> None:
        if extra is None:
            return
        if not isinstance(extra, Mapping):
            raise InvalidRequestError(f"extra: got {type(extra).__name__}, expected a mapping")
        for key, value in extra.items():
            field = next((field for field, names in NAMES.items() if key in names), None)
            if field is not None:
                raise InvalidRequestError(f"extra.{key}: got {brief(value)}; set the parameter {field} instead")
            if key not in self._extra_keys:
                raise InvalidRequestError(f"extra.{key}: unknown key{did_you_mean(str(key), self._extra_keys)}")
            self._check_extra_value(key, value)

    def _check_extra_value(self, key: str, value: object) -> None:
        """Numbers are finite; what multiplies the work has the limit of steps, or of guidance."""
        if isinstance(value, str) and len(value) > self._limits.max_prompt_chars:
            raise InvalidRequestError(f"extra.{key}: got {len(value)} characters (limits.max_prompt_chars)")
        if key == "timesteps" and isinstance(value, list | tuple):
            check_limit("extra.timesteps: its length", len(value), 1, self._limits.max_inference_steps, integer=True)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        check_number(f"extra.{key}", value, 0 if key == AUDIO_START else None, raises=InvalidRequestError)
        if "num_" in key:
            check_limit(f"extra.{key}", value, 0, self._limits.max_inference_steps)
        elif key.endswith(("guidance_scale", "cfg_scale")):
            most = self._limits.max_guidance_scale
            check_limit(f"extra.{key}", value, -most, most)

    def _not_taken(self, field: str, names: tuple[str, ...]) -> InvalidRequestError:
        words = " or ".join(repr(name) for name in names)
        return InvalidRequestError(f"{field}: {self.name} does not take it (it has no {words}); leave it unset")
