"""A published Z-Image folder (diffusers ZImagePipeline) as a DiffusionModel: native transformer, diffusers' VAE and
sampler.

Formulas (shift, guidance, normalisation, truncation, latent scaling) are those of diffusers' pipeline_z_image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import ConfigError, InvalidRequestError, StageError
from vllm_omni.layers.weights import load_weights, weights_bytes
from vllm_omni.models.z_image.packing import PATCH, Tokens, padded
from vllm_omni.models.z_image.transformer import ZImageConfig, ZImageTransformer
from vllm_omni.params import DiffusionParams
from vllm_omni.payload import StageSignature, TensorSpec
from vllm_omni.request import OmniRequest
from vllm_omni.utils.checks import check_number, did_you_mean
from vllm_omni.utils.files import read_json
from vllm_omni.worker.diffusion.diffusion_model import DiffusionModel, Sampler, Trajectory, check_limit

EXTRA_KEYS = ("cfg_normalization", "cfg_truncation")
UNUSED_FIELDS = ("strength", "image", "duration_s")
NUM_TRAIN_TIMESTEPS = 1000
SAMPLER_CLASS = "FlowMatchEulerDiscreteScheduler"


POSITIVE, NEGATIVE = "positive", "negative"
NEGATIVE_PORT = "negative_prompt_embeds"
# Hidden states, their normed copy, q, k, v, both halves of the feed-forward's input (8/3 each) and its product.
ACTIVATION_WIDTHS = 14


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all pictures of a request share. texts: branch -> [T, D] as the transformer takes them."""

    height: int
    width: int
    texts: Mapping[str, Tensor]


class ZImageTrajectory(Trajectory):
    """The way of one picture. Guidance adds `scale * (positive - negative)`, so 0 is neutral."""

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        sampler: Sampler,
        num_tokens: int,
        texts: Mapping[str, Tensor],
        params: DiffusionParams,
    ) -> None:
        self.latent_shape = latent_shape
        self.sampler = sampler
        self.num_tokens = num_tokens
        self.conditions = texts
        extra = params.extra or {}
        self._scale = guidance_scale(params)
        self._truncation = float(extra.get("cfg_truncation", 1.0))
        self._norm_limit = float(extra.get("cfg_normalization", 0.0))

    def branches(self, timestep: float) -> tuple[str, ...]:
        is_truncated = self._truncation <= 1 and _cleanness(timestep) > self._truncation
        return (POSITIVE, NEGATIVE) if self._scale > 0 and not is_truncated else (POSITIVE,)

    def combine(self, outputs: Sequence[Tensor], timestep: float) -> Tensor:
        if len(outputs) == 1:
            return outputs[0]
        positive, negative = outputs
        guided = positive + self._scale * (positive - negative)
        if self._norm_limit > 0:
            most = torch.linalg.vector_norm(positive) * self._norm_limit
            norm = torch.linalg.vector_norm(guided)
            guided = torch.where(norm > most, guided * (most / norm), guided)
        return guided


class ZImagePipeline(DiffusionModel):
    """Text to image. default_steps and default_guidance are the published pipeline's own fallbacks."""

    output_port = "image"
    default_steps = 50
    default_guidance = 5.0

    def __init__(
        self, transformer: ZImageTransformer, vae: Any, sampler_config: Mapping[str, Any], native_size: int
    ) -> None:
        self.transformer = transformer
        self.vae = vae
        self.native_size = native_size
        self.num_blocks = len(transformer.layers)
        self._sampler_config = dict(sampler_config)
        self._vae_scale = 2 ** (len(vae.config.block_out_channels) - 1)
        self._device = transformer.x_pad_token.device

    @classmethod
    def signature(cls, folder: Path) -> StageSignature:
        text = TensorSpec(("T", ZImageConfig.from_folder(folder / "transformer").cap_feat_dim))
        return StageSignature(
            inputs={"prompt_embeds": text, NEGATIVE_PORT: text},
            outputs={"image": TensorSpec(("N", "H", "W", 3)), "latents": TensorSpec(("N", "C", "h", "w"))},
            required_inputs=frozenset({"prompt_embeds"}),
            results=frozenset({"image"}),
        )

    @classmethod
    def needed_inputs(
        cls, folder: Path, connected: frozenset[str], request: OmniRequest, params: DiffusionParams
    ) -> frozenset[str]:
        return connected if guidance_scale(params) > 0 else connected - {NEGATIVE_PORT}

    @classmethod
    def weights_bytes(cls, folder: Path, dtype: torch.dtype) -> int:
        return sum(weights_bytes(folder / part, dtype.itemsize) for part in ("transformer", "vae"))

    @classmethod
    def token_bytes(cls, folder: Path, dtype: torch.dtype) -> int:
        return ZImageConfig.from_folder(folder / "transformer").dim * dtype.itemsize * ACTIVATION_WIDTHS

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> ZImagePipeline:
        from diffusers import AutoencoderKL

        config = ZImageConfig.from_folder(folder / "transformer")
        with torch.device("meta"):
            transformer = ZImageTransformer(config)
        transformer.to_empty(device=device).to(dtype).requires_grad_(False).eval()
        load_weights(transformer, folder / "transformer")
        vae = AutoencoderKL.from_pretrained(
            folder / "vae", torch_dtype=dtype, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        )
        vae = vae.to(device=device, memory_format=torch.channels_last).requires_grad_(False).eval()
        sampler = read_json(folder / "scheduler" / "scheduler_config.json")
        if sampler.get("_class_name") != SAMPLER_CLASS:
            raise ConfigError(f"{folder}/scheduler: got {sampler.get('_class_name')!r}, expected {SAMPLER_CLASS}")
        native_size = read_json(folder / "vae" / "config.json").get("sample_size", 1024)
        return cls(transformer, vae, sampler, int(native_size))

    def check(
        self, request: OmniRequest, params: DiffusionParams, connected: frozenset[str], limits: LimitsConfig
    ) -> None:
        for name in UNUSED_FIELDS:
            if getattr(params, name) is not None:
                raise InvalidRequestError(
                    f"{name}: Z-Image turns text into images and does not read it; leave it unset"
                )
        _check_extra(params.extra or {})
        self._check_size(params, limits)
        check_limit("guidance_scale", guidance_scale(params), 0, limits.max_guidance_scale)
        _check_guidance(request, params, connected)

    def num_steps(self, params: DiffusionParams) -> int:
        if params.sigmas is not None:
            return len(params.sigmas)
        return self.default_steps if params.num_inference_steps is None else params.num_inference_steps

    def job_size(self, request: OmniRequest, params: DiffusionParams) -> float:
        height, width = self._size(params)
        branches = 2 if guidance_scale(params) > 0 else 1
        return float(height * width * self.num_steps(params) * branches * (params.num_outputs or 1)) * 1e-6

    def prepare(self, inputs: Mapping[str, Any], params: DiffusionParams, seed: int) -> Prepared:
        texts = {POSITIVE: self._encode_text(inputs["prompt_embeds"])}
        if guidance_scale(params) > 0:
            if NEGATIVE_PORT not in inputs:
                raise StageError(f"{NEGATIVE_PORT}: not given, but guidance_scale {guidance_scale(params):g} reads it")
            texts[NEGATIVE] = self._encode_text(inputs[NEGATIVE_PORT])
        return Prepared(*self._size(params), texts)

    def trajectory(self, prepared: Prepared, params: DiffusionParams) -> ZImageTrajectory:
        height, width = prepared.height // self._vae_scale, prepared.width // self._vae_scale
        num_image_tokens = (height // PATCH) * (width // PATCH)
        return ZImageTrajectory(
            latent_shape=(self.transformer.config.in_channels, height, width),
            sampler=self._sampler(params, num_image_tokens),
            num_tokens=sum(padded(num_image_tokens) + len(text) for text in prepared.texts.values()),
            texts=prepared.texts,
            params=params,
        )

    def begin(self, latents: Sequence[Tensor], timesteps: Sequence[float], conditions: Sequence[Tensor]) -> Tokens:
        clean = [_cleanness(timestep) for timestep in timesteps]
        levels = torch.tensor(clean, dtype=torch.float32, device=self._device)
        return self.transformer.begin(latents, levels, conditions)

    def run_blocks(self, tokens: Tokens, start: int, stop: int) -> Tokens:
        return self.transformer.run_blocks(tokens, start, stop)

    def finish(self, tokens: Tokens) -> list[Tensor]:
        return [-velocity.float() for velocity in self.transformer.finish(tokens)]

    def num_pieces(self, latents: Tensor, kept: slice) -> int:
        return 1

    def decode(self, latents: Tensor, kept: slice) -> Iterator[Tensor]:
        config = self.vae.config
        scaled = (latents[None] / config.scaling_factor + config.shift_factor).to(self.vae.dtype)
        decoded = self.vae.decode(scaled.contiguous(memory_format=torch.channels_last)).sample[0]
        pixels = (decoded.float() / 2 + 0.5).clamp(0, 1)
        yield (pixels * 255).round().to(torch.uint8).permute(1, 2, 0)

    def assemble(self, pieces: Sequence[Tensor], params: DiffusionParams) -> Tensor:
        return pieces[0]

    def _check_size(self, params: DiffusionParams, limits: LimitsConfig) -> None:
        multiple = self._vae_scale * PATCH
        longest = min(self.transformer.config.axes_lens[1:]) * multiple
        height, width = self._size(params)
        for name, value in (("height", height), ("width", width)):
            if value % multiple or value > longest:
                raise InvalidRequestError(
                    f"{name}: got {value}, expected a multiple of {multiple} and at most {longest}"
                )
        check_limit("height * width", height * width, 1, limits.max_pixels, integer=True)

    def _size(self, params: DiffusionParams) -> tuple[int, int]:
        """(height, width) in pixels, the model's own where the request names none."""
        height, width = params.height, params.width
        return (self.native_size if height is None else height, self.native_size if width is None else width)

    def _sampler(self, params: DiffusionParams, num_image_tokens: int) -> Sampler:
        from diffusers import FlowMatchEulerDiscreteScheduler

        sampler = FlowMatchEulerDiscreteScheduler.from_config(self._sampler_config)
        num_steps = self.num_steps(params)
        sigmas = params.sigmas or torch.linspace(1.0, 1 / num_steps, num_steps).tolist()
        sampler.set_timesteps(sigmas=list(sigmas), device=self._device, mu=self._shift(num_image_tokens))
        sampler.set_begin_index(0)
        return cast(Sampler, sampler)

    def _shift(self, num_image_tokens: int) -> float:
        """Linear in the picture's tokens; only a sampler with dynamic shifting reads it."""
        config = self._sampler_config
        base, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return float(base_shift + (max_shift - base_shift) / (most - base) * (num_image_tokens - base))

    def _encode_text(self, prompt_embeds: Tensor) -> Tensor:
        """[t, D] states of one prompt -> [T, D], padded to the multiple that the model attends to."""
        length = len(prompt_embeds)
        limit = self.transformer.config.axes_lens[0] - 2
        if not 0 < length <= limit - limit % 32:
            raise InvalidRequestError(f"prompt_embeds: got {length} tokens, expected 1 to {limit - limit % 32}")
        missing = padded(length) - length
        features = torch.nn.functional.pad(prompt_embeds.to(self.transformer.x_pad_token), (0, 0, 0, missing))
        is_padding = torch.arange(length + missing, device=self._device) >= length
        return self.transformer.encode_text(features[None], is_padding[None])[0]


def guidance_scale(params: DiffusionParams) -> float:
    return ZImagePipeline.default_guidance if params.guidance_scale is None else params.guidance_scale


def _cleanness(timestep: float) -> float:
    """Timestep of the sampler (1000 is pure noise) -> time of the transformer (1 is clean)."""
    return (NUM_TRAIN_TIMESTEPS - timestep) / NUM_TRAIN_TIMESTEPS


def _check_extra(extra: Mapping[str, Any]) -> None:
    for name, value in extra.items():
        if name not in EXTRA_KEYS:
            raise InvalidRequestError(f"extra.{name}: unknown key{did_you_mean(str(name), EXTRA_KEYS)}")
        if not (isinstance(value, bool)):
            check_number(f"extra.{name}", value, 0, raises=InvalidRequestError)


def _check_guidance(request: OmniRequest, params: DiffusionParams, connected: frozenset[str]) -> None:
    scale = guidance_scale(params)
    if scale <= 0 and (params.negative_prompt or request.negative_prompt):
        raise InvalidRequestError(
            f"negative_prompt: guidance_scale {scale:g} never reads it; raise guidance_scale or leave it out"
        )
    if scale > 0 and NEGATIVE_PORT not in connected:
        raise InvalidRequestError(
            f"guidance_scale: got {scale}, but the stage has no input {NEGATIVE_PORT};"
            " add the edge or turn guidance off"
        )
