"""What is known of a published FLUX.2 [klein] folder before its weights are loaded, and what a request may ask of it.

One spec for each of diffusers' pipelines: Flux2KleinPipeline, Flux2KleinKVPipeline, Flux2KleinInpaintPipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.layers.meta_device import on_meta_device
from vllm_omni.layers.published_quantization import read_quantization
from vllm_omni.layers.shard import ALONE, Shards
from vllm_omni.layers.weights import MakeCopies, allocate, load_weights
from vllm_omni.models.flux2.config import Flux2Config
from vllm_omni.models.flux2.lora_names import lora_aliases
from vllm_omni.models.flux2.pictures import Size, check_pictures, pictures_of
from vllm_omni.models.flux2.pipeline import NEGATIVE_PORT, Geometry, KleinPipeline
from vllm_omni.models.flux2.trajectory import (
    DEFAULT_GUIDANCE,
    DEFAULT_STEPS,
    first_step,
    guidance_scale,
    is_guided,
    num_steps,
)
from vllm_omni.models.flux2.transformer import Flux2Transformer
from vllm_omni.params import DiffusionParams
from vllm_omni.payload import StageSignature, TensorSpec
from vllm_omni.request import OmniRequest
from vllm_omni.utils.checks import brief, did_you_mean
from vllm_omni.utils.files import read_json
from vllm_omni.worker.diffusion.flow_sampler import read_flow_sampler
from vllm_omni.worker.diffusion.picture_autoencoder import load_autoencoder
from vllm_omni.worker.diffusion.preview_map import PreviewMap
from vllm_omni.worker.diffusion.request_checks import check_negative, check_scale, check_size, check_unread
from vllm_omni.worker.diffusion.shared_model import SharedModelSpec
from vllm_omni.worker.diffusion.tiling import DecodingSize

DISTILLED_DEFAULTS = {"num_inference_steps": 4, "guidance_scale": 1.0}
BASE_DEFAULTS = {"num_inference_steps": DEFAULT_STEPS, "guidance_scale": DEFAULT_GUIDANCE}
MAX_VAE_BLOCKS = 10


class KleinSpec(SharedModelSpec):
    """Text to image, after up to four references, and a picture drawn anew where a mask says so."""

    gives_previews = True
    can_quantize = True
    can_offload = True
    packs_vae = True
    adapted_part = "transformer"
    request_keys = frozenset({"image", "mask", "strength"})
    media_keys = frozenset({"image", "mask"})
    keeps_references: ClassVar[bool] = False
    needs_mask: ClassVar[bool] = False

    parallel_axes: ClassVar[tuple[str, ...]] = ("tensor", "guidance")
    shared_parts = ("double_blocks", "single_blocks")

    def __init__(self, folder: Path, weights_variant: str | None = None) -> None:
        super().__init__(folder, weights_variant)
        self.weight_folders = [folder / part for part in ("transformer", "vae")]
        self.config = Flux2Config.from_folder(folder / "transformer")
        config_file = folder / "transformer" / "config.json"
        self._published_quantization = read_quantization(read_json(config_file), str(config_file))
        self.geometry = _geometry(folder / "vae" / "config.json", self.config)
        self.preview_map = PreviewMap.of_vae(folder / "vae")
        self.sampler_config = read_flow_sampler(folder / "scheduler")
        self.is_distilled, self._reason = self._read_distilled(folder / "model_index.json")
        self.defaults = DISTILLED_DEFAULTS if self.is_distilled else BASE_DEFAULTS
        text = TensorSpec(("T", self.config.joint_attention_dim))
        self.signature = StageSignature(
            inputs={"prompt_embeds": text, NEGATIVE_PORT: text},
            outputs={"image": TensorSpec(("N", "H", "W", 3)), "latents": TensorSpec(("N", "C", "h", "w"))},
            required_inputs=frozenset({"prompt_embeds"}),
            results=frozenset({"image"}),
        )

    def shared_counts(self) -> dict[str, dict[str, int]]:
        heads, widths = self.config.num_attention_heads, self.config.mlp_dim
        return {"tensor": {"heads": heads, "widths of the feed-forward": widths}}

    def build_transformer(self, shards: Shards = ALONE) -> Flux2Transformer:
        with on_meta_device():
            return Flux2Transformer(self.config, shards)

    def lora_aliases(self) -> Mapping[str, str]:
        return lora_aliases(self.config)

    def published_quantization(self) -> str | None:
        return self._published_quantization

    def token_bytes(self, dtype: torch.dtype) -> int:
        return self.config.dim * dtype.itemsize * self.config.activation_widths

    def decoding_size(self, dtype: torch.dtype) -> DecodingSize:
        return DecodingSize.of_folder(self.folder / "vae", self.geometry.multiple, dtype)

    def load(
        self,
        device: torch.device,
        dtype: torch.dtype,
        quantization: str | None = None,
        make_copies: MakeCopies | None = None,
        shards: Shards = ALONE,
    ) -> KleinPipeline:
        from diffusers import AutoencoderKLFlux2

        transformer = self.build_transformer(shards)
        allocate(transformer, device, dtype, quantization, make_copies)
        load_weights(transformer, self.folder / "transformer", variant=self.weights_variant)
        folder = self.folder / "vae"
        vae = load_autoencoder(AutoencoderKLFlux2, folder, device, self.part_dtype(folder, dtype), self.weights_variant)
        return KleinPipeline(
            transformer, vae, self.sampler_config, self.geometry, self.preview_map, self.keeps_references
        )

    def check(
        self, request: OmniRequest, params: DiffusionParams, connected: frozenset[str], limits: LimitsConfig
    ) -> None:
        check_unread(params, ("duration_s",), "FLUX.2")
        for name in params.extra or {}:
            raise InvalidRequestError(f"extra.{name}: unknown key{did_you_mean(str(name), ())}")
        self._check_pictures(params, limits)
        check_scale(params, guidance_scale(params), num_steps(params), limits)
        self._check_guidance(request, params, connected)

    def num_steps(self, params: DiffusionParams) -> int:
        return num_steps(params)

    def job_size(self, request: OmniRequest, params: DiffusionParams) -> float:
        height, width = self.geometry.size(params, [])
        pictures = 1 + (0 if self.keeps_references else len(pictures_of(params)))
        steps = num_steps(params) - first_step(params)
        branches = 2 if is_guided(params) else 1
        return float(height * width * pictures * steps * branches * (params.num_outputs or 1)) * 1e-6

    def needed_inputs(self, connected: frozenset[str], request: OmniRequest, params: DiffusionParams) -> frozenset[str]:
        return connected if is_guided(params) else connected - {NEGATIVE_PORT}

    def note(self) -> str:
        kept = ", keeps keys and values of references" if self.keeps_references else ""
        return f"FLUX.2 [klein] {'distilled' if self.is_distilled else 'base'} ({self._reason}){kept}"

    def _read_distilled(self, file: Path) -> tuple[bool, str]:
        """And what says so."""
        value = read_json(file).get("is_distilled", False)
        if not isinstance(value, bool):
            raise ConfigError(f"{file}: is_distilled: got {brief(value)}, expected true or false")
        return value, f"by its model_index.json, is_distilled {str(value).lower()}"

    def _check_pictures(self, params: DiffusionParams, limits: LimitsConfig) -> None:
        sizes = check_pictures(params, limits)
        if self.needs_mask and (params.image is None or params.mask is None):
            name = "image" if params.image is None else "mask"
            raise InvalidRequestError(f"{name}: missing; this pipeline draws an image anew where a mask says so")
        self._check_size(params, sizes, limits)
        if first_step(params) >= num_steps(params):
            raise InvalidRequestError(
                f"strength: got {params.strength}, which leaves none of {num_steps(params)} steps; expected more than"
                " 0, or more steps"
            )

    def _check_size(self, params: DiffusionParams, pictures: list[Size], limits: LimitsConfig) -> None:
        height, width = self.geometry.size(params, pictures)
        check_size((height, width), (self.geometry.multiple, self.geometry.multiple), limits)
        if params.mask is not None:
            expected = self.geometry.size(DiffusionParams(), pictures)
            for name, value, side in zip(("height", "width"), (height, width), expected, strict=True):
                if value != side:
                    raise InvalidRequestError(
                        f"{name}: got {value}, expected {side}, which the image has that is drawn anew; leave it out"
                    )

    def _check_guidance(self, request: OmniRequest, params: DiffusionParams, connected: frozenset[str]) -> None:
        scale = guidance_scale(params)
        if self.is_distilled and is_guided(params):
            raise InvalidRequestError(
                f"guidance_scale: got {scale:g}, but this checkpoint is distilled and never reads it; leave it out"
            )
        check_negative(request, params, scale, NEGATIVE_PORT, connected, is_distilled=self.is_distilled)


class KleinKVSpec(KleinSpec):
    """References attend only to each other, so that they are computed once per request. Always distilled."""

    request_keys = media_keys = frozenset({"image"})
    keeps_references = True
    parallel_axes: ClassVar[tuple[str, ...]] = ()  # what references are remembered as stands in the blocks of one rank

    def _read_distilled(self, file: Path) -> tuple[bool, str]:
        return True, "as all Flux2KleinKVPipeline are"

    def _check_pictures(self, params: DiffusionParams, limits: LimitsConfig) -> None:
        for name in ("mask", "strength"):
            if getattr(params, name) is not None:
                raise InvalidRequestError(f"{name}: this pipeline draws after references and does not read it")
        super()._check_pictures(params, limits)


class KleinInpaintSpec(KleinSpec):
    """A picture drawn anew where a mask says so, and nothing else."""

    needs_mask = True


def _geometry(file: Path, config: Flux2Config) -> Geometry:
    """From the VAE's configuration."""
    vae = {"latent_channels": 32, "patch_size": [2, 2], **read_json(file)}
    widths = vae.get("block_out_channels")
    if not isinstance(widths, list) or not 1 <= len(widths) <= MAX_VAE_BLOCKS:
        raise ConfigError(
            f"{file}: block_out_channels: got {brief(widths)}, expected a list of 1 to {MAX_VAE_BLOCKS} widths"
        )
    expected = {"latent_channels": config.in_channels // 4, "patch_size": [2, 2]}
    for key, value in expected.items():
        if vae[key] != value:
            raise ConfigError(f"{file}: {key}: got {brief(vae[key])}, expected {value}, which the transformer takes")
    return Geometry(vae_scale=2 ** (len(widths) - 1))
