"""What is known of a published Z-Image folder (diffusers ZImagePipeline) before its weights are loaded, and what a
request may ask of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.layers.meta_device import on_meta_device
from vllm_omni.layers.published_quantization import read_quantization
from vllm_omni.layers.shard import ALONE, Shards
from vllm_omni.layers.weights import MakeCopies, allocate, load_weights
from vllm_omni.models.z_image.config import ZImageConfig
from vllm_omni.models.z_image.packing import SEQUENCE_MULTIPLE
from vllm_omni.models.z_image.pipeline import NEGATIVE_PORT, ImageGeometry, ZImagePipeline
from vllm_omni.models.z_image.trajectory import guidance_scale, num_steps
from vllm_omni.models.z_image.transformer import ZImageTransformer
from vllm_omni.models.z_image.variant import Variant
from vllm_omni.params import DiffusionParams
from vllm_omni.payload import StageSignature, TensorSpec
from vllm_omni.request import OmniRequest
from vllm_omni.utils.checks import brief, check_number, did_you_mean
from vllm_omni.utils.files import read_json
from vllm_omni.worker.diffusion.diffusion_model import check_limit
from vllm_omni.worker.diffusion.flow_sampler import read_flow_sampler
from vllm_omni.worker.diffusion.picture_autoencoder import load_autoencoder
from vllm_omni.worker.diffusion.preview_map import PreviewMap
from vllm_omni.worker.diffusion.request_checks import check_scale, check_unread
from vllm_omni.worker.diffusion.shared_model import SharedModelSpec
from vllm_omni.worker.diffusion.source_image import check_source, first_step
from vllm_omni.worker.diffusion.tiling import DecodingSize

EXTRA_KEYS = ("cfg_normalization", "cfg_truncation")
UNUSED_FIELDS = ("duration_s",)
MAX_SIDE = 2**16  # pixels
MAX_VAE_BLOCKS = 10
# Hidden states before and behind blocks, their normed copy, packed keys and values, what attention gives and what is
# added, both halves of the feed-forward's input (8/3 each; q, k, v before them) and its product, and what pads rows.
ACTIVATION_WIDTHS = 16


class ZImageSpec(SharedModelSpec):
    """Text to image, image to image, inpainting."""

    gives_previews = True
    can_quantize = True
    can_offload = True
    packs_vae = True
    request_keys = frozenset({"image", "mask", "strength"})
    media_keys = frozenset({"image", "mask"})
    adapted_part = "transformer"
    parallel_axes = ("tensor", "sequence", "guidance")
    shared_parts = ("layers",)

    def __init__(self, folder: Path, weights_variant: str | None = None) -> None:
        super().__init__(folder, weights_variant)
        self.weight_folders = [folder / part for part in ("transformer", "vae")]
        self.config = ZImageConfig.from_folder(folder / "transformer")
        config_file = folder / "transformer" / "config.json"
        self._published_quantization = read_quantization(read_json(config_file), str(config_file))
        self.geometry = _geometry(folder / "vae" / "config.json")
        self.preview_map = PreviewMap.of_vae(folder / "vae")
        self.sampler_config = read_flow_sampler(folder / "scheduler")
        self.variant = Variant.of(folder, self.sampler_config)
        self.defaults = self.variant.defaults
        text = TensorSpec(("T", self.config.cap_feat_dim))
        self.signature = StageSignature(
            inputs={"prompt_embeds": text, NEGATIVE_PORT: text},
            outputs={"image": TensorSpec(("N", "H", "W", 3)), "latents": TensorSpec(("N", "C", "h", "w"))},
            required_inputs=frozenset({"prompt_embeds"}),
            results=frozenset({"image"}),
        )

    def build_transformer(self, shards: Shards = ALONE) -> ZImageTransformer:
        with on_meta_device():
            return ZImageTransformer(self.config, shards)

    def shared_counts(self) -> dict[str, dict[str, int]]:
        heads = {"heads": self.config.n_heads}
        widths = {**heads, "widths of the feed-forward": self.config.hidden_dim}
        return {"tensor": widths, "sequence": {**heads, "tokens that lengths are padded to": SEQUENCE_MULTIPLE}}

    def published_quantization(self) -> str | None:
        return self._published_quantization

    def token_bytes(self, dtype: torch.dtype) -> int:
        return self.config.dim * dtype.itemsize * ACTIVATION_WIDTHS

    def decoding_size(self, dtype: torch.dtype) -> DecodingSize:
        return DecodingSize.of_folder(self.folder / "vae", self.geometry.vae_scale, dtype)

    def load(
        self,
        device: torch.device,
        dtype: torch.dtype,
        quantization: str | None = None,
        make_copies: MakeCopies | None = None,
        shards: Shards = ALONE,
    ) -> ZImagePipeline:
        from diffusers import AutoencoderKL

        transformer = self.build_transformer(shards)
        allocate(transformer, device, dtype, quantization, make_copies)
        load_weights(transformer, self.folder / "transformer", variant=self.weights_variant)
        folder = self.folder / "vae"
        vae = load_autoencoder(AutoencoderKL, folder, device, self.part_dtype(folder, dtype), self.weights_variant)
        return ZImagePipeline(transformer, vae, self.sampler_config, self.geometry, self.preview_map)

    def check(
        self, request: OmniRequest, params: DiffusionParams, connected: frozenset[str], limits: LimitsConfig
    ) -> None:
        check_unread(params, UNUSED_FIELDS, "Z-Image")
        _check_extra(params.extra or {})
        self._check_size(params, check_source(params, num_steps(params), limits), limits)
        check_scale(params, guidance_scale(params), num_steps(params), limits)
        _check_guidance(request, params, connected)

    def num_steps(self, params: DiffusionParams) -> int:
        return num_steps(params)

    def job_size(self, request: OmniRequest, params: DiffusionParams) -> float:
        height, width = self.geometry.size(params)
        branches = 2 if guidance_scale(params) > 0 else 1
        steps = num_steps(params) - first_step(params, num_steps(params))
        return float(height * width * steps * branches * (params.num_outputs or 1)) * 1e-6

    def needed_inputs(self, connected: frozenset[str], request: OmniRequest, params: DiffusionParams) -> frozenset[str]:
        return connected if guidance_scale(params) > 0 else connected - {NEGATIVE_PORT}

    def note(self) -> str:
        return self.variant.words()

    def _check_size(self, params: DiffusionParams, source: tuple[int, int] | None, limits: LimitsConfig) -> None:
        """source: of the picture that it starts from, in pixels, which then is the size where none is asked for."""
        multiple = self.geometry.multiple
        longest = min(self.config.axes_lens[1:]) * multiple
        height, width = self.geometry.size(params, source)
        for name, value in (("height", height), ("width", width)):
            if getattr(params, name) is None and source is not None and not 0 < value <= longest:
                raise InvalidRequestError(
                    f"image: got {source[1]}x{source[0]} pixels, expected {multiple} to {longest} a side, or {name} set"
                )
            if value % multiple or value > longest:
                raise InvalidRequestError(
                    f"{name}: got {value}, expected a multiple of {multiple} and at most {longest}"
                )
        check_limit("height * width", height * width, 1, limits.max_pixels, integer=True)


def _geometry(file: Path) -> ImageGeometry:
    """From the VAE's configuration."""
    vae = {"sample_size": 1024, "block_out_channels": [64], **read_json(file)}
    size, widths = vae["sample_size"], vae["block_out_channels"]
    check_number(f"{file}: sample_size", size, 1, MAX_SIDE, integer=True, raises=ConfigError)
    if not isinstance(widths, list) or not 1 <= len(widths) <= MAX_VAE_BLOCKS:
        raise ConfigError(
            f"{file}: block_out_channels: got {brief(widths)}, expected a list of 1 to {MAX_VAE_BLOCKS} widths"
        )
    return ImageGeometry(native_size=int(size), vae_scale=2 ** (len(widths) - 1))


def _check_extra(extra: Mapping[str, Any]) -> None:
    for name, value in extra.items():
        if name not in EXTRA_KEYS:
            raise InvalidRequestError(f"extra.{name}: unknown key{did_you_mean(str(name), EXTRA_KEYS)}")
        if not isinstance(value, bool):
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
