"""What is known of a published Wan folder (diffusers' WanPipeline) before its weights are loaded, and what a request
may ask of it.
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
from vllm_omni.layers.weights import MakeCopies, allocate, load_weights
from vllm_omni.media.image_input import image_size
from vllm_omni.models.wan.config import WanConfig
from vllm_omni.models.wan.geometry import T2V, TI2V, VideoGeometry
from vllm_omni.models.wan.lora_names import lora_aliases
from vllm_omni.models.wan.pipeline import PORTS, WanPipeline
from vllm_omni.models.wan.sampler import MAX_SHIFT, read_sampler
from vllm_omni.models.wan.trajectory import (
    DEFAULT_GUIDANCE,
    DEFAULT_STEPS,
    SHIFT,
    guidance_scale,
    is_guided,
    num_steps,
    shift_of,
)
from vllm_omni.models.wan.transformer import WanTransformer
from vllm_omni.models.wan.vae import DTYPE, FilmVae, VaeConfig
from vllm_omni.params import DiffusionParams
from vllm_omni.payload import StageSignature, TensorSpec
from vllm_omni.request import OmniRequest
from vllm_omni.utils.checks import brief, check_number
from vllm_omni.utils.files import read_json
from vllm_omni.worker.diffusion.diffusion_model import DiffusionModelSpec, check_limit
from vllm_omni.worker.diffusion.flow_trajectory import NEGATIVE, POSITIVE
from vllm_omni.worker.diffusion.preview_map import PreviewMap
from vllm_omni.worker.diffusion.request_checks import check_negative, check_scale, check_size, check_unread
from vllm_omni.worker.diffusion.tiling import DecodingSize

UNUSED_FIELDS = ("mask", "strength", "duration_s", "sigmas")


class WanSpec(DiffusionModelSpec):
    """Text to video and, of a checkpoint whose tokens have timesteps of their own (Wan 2.2 TI2V), from a first
    frame.
    """

    gives_previews = True
    can_quantize = True
    can_offload = True
    packs_vae = True
    adapted_part = "transformer"
    request_keys = frozenset({"image"})
    media_keys = frozenset({"image"})

    def __init__(self, folder: Path, weights_variant: str | None = None) -> None:
        super().__init__(folder, weights_variant)
        index, where = read_json(folder / "model_index.json"), f"{folder}/model_index.json"
        _check_one_expert(index, where)
        self.continues_pictures = index.get("expand_timesteps", False) is True
        native = TI2V if self.continues_pictures else T2V
        self.frame_rate = native.fps
        self.defaults = {"num_inference_steps": DEFAULT_STEPS, "guidance_scale": DEFAULT_GUIDANCE}
        self.weight_folders = [folder / part for part in ("transformer", "vae")]
        config_file = folder / "transformer" / "config.json"
        self.config = WanConfig.from_folder(folder / "transformer")
        self._published_quantization = read_quantization(read_json(config_file), str(config_file))
        self.vae_config = vae = VaeConfig.from_folder(folder / "vae")
        if vae.num_channels != self.config.out_channels:
            raise ConfigError(
                f"{folder}/vae/config.json: z_dim: got {vae.num_channels}, expected the transformer's out_channels,"
                f" {self.config.out_channels}"
            )
        self.geometry = VideoGeometry(vae.scale, vae.frame_scale, *self.config.patch_size[1:], native)
        self.preview_map = PreviewMap.of_vae(folder / "vae")
        self.sampler_config = read_sampler(folder / "scheduler")
        self.signature = StageSignature(
            inputs=dict.fromkeys(PORTS.values(), TensorSpec(("T", self.config.text_dim))),
            outputs={"video": TensorSpec(("N", "n", "H", "W", 3)), "latents": TensorSpec(("N", "C", "f", "h", "w"))},
            required_inputs=frozenset({PORTS[POSITIVE]}),
            results=frozenset({"video"}),
        )

    def build_transformer(self) -> WanTransformer:
        with on_meta_device():
            return WanTransformer(self.config)

    def lora_aliases(self) -> Mapping[str, str]:
        return lora_aliases(self.config)

    def published_quantization(self) -> str | None:
        return self._published_quantization

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Hidden states, their normed copy and what a block adds; the feed-forward's input twice, or queries, keys and
        values with their normed copies, whichever is wider.
        """
        return (3 * self.config.dim + max(2 * self.config.ffn_dim, 5 * self.config.dim)) * dtype.itemsize

    def decoding_size(self, dtype: torch.dtype) -> DecodingSize:
        native = self.geometry.native
        return self.vae_config.decoding_size(native.height * native.width)

    def part_dtype(self, folder: Path, dtype: torch.dtype) -> torch.dtype:
        return DTYPE if folder.name == "vae" else dtype

    def load(
        self,
        device: torch.device,
        dtype: torch.dtype,
        quantization: str | None = None,
        make_copies: MakeCopies | None = None,
    ) -> WanPipeline:
        transformer = self.build_transformer()
        allocate(transformer, device, dtype, quantization, make_copies)
        load_weights(transformer, self.folder / "transformer", variant=self.weights_variant)
        vae = FilmVae.load(self.folder / "vae", device, self.weights_variant)
        return WanPipeline(transformer, vae, self.sampler_config, self.geometry, self.preview_map)

    def check(
        self, request: OmniRequest, params: DiffusionParams, connected: frozenset[str], limits: LimitsConfig
    ) -> None:
        check_unread(params, UNUSED_FIELDS, "Wan")
        for name in params.extra or {}:
            if name != SHIFT:
                raise InvalidRequestError(f"extra.{name}: unknown key; Wan reads {SHIFT!r} alone")
        shift = shift_of(params)
        if shift is not None:
            check_number(f"extra.{SHIFT}", shift, 0, MAX_SHIFT, above_low=True, raises=InvalidRequestError)
        self._check_size(params, self._picture_size(params, limits), limits)
        check_scale(params, guidance_scale(params), num_steps(params), limits)
        check_negative(request, params, guidance_scale(params), PORTS[NEGATIVE], connected)

    def num_steps(self, params: DiffusionParams) -> int:
        return num_steps(params)

    def job_size(self, request: OmniRequest, params: DiffusionParams) -> float:
        height, width = self.geometry.size(params)
        pixels = height * width * self.geometry.num_frames(params)
        return float(pixels * num_steps(params) * (2 if is_guided(params) else 1) * (params.num_outputs or 1)) * 1e-6

    def needed_inputs(self, connected: frozenset[str], request: OmniRequest, params: DiffusionParams) -> frozenset[str]:
        return connected if is_guided(params) else connected - {PORTS[NEGATIVE]}

    def note(self) -> str:
        made = "of words, and from a first frame" if self.continues_pictures else "of words"
        native, (down, across) = self.geometry.native, self.geometry.multiples
        return (
            f"Wan: makes videos {made}, {native.fps:g} frames a second, {native.num_frames} frames of"
            f" {native.width}x{native.height} unless a request says otherwise; frames are one more than a multiple of"
            f" {self.geometry.frame_scale}, width of {across}, height of {down}"
        )

    def _picture_size(self, params: DiffusionParams, limits: LimitsConfig) -> tuple[int, int] | None:
        """(height, width) of the first frame, None where the request brings none; nothing is decoded."""
        if params.image is None:
            return None
        if not self.continues_pictures:
            raise InvalidRequestError(
                "image: this checkpoint makes videos of words alone (expand_timesteps of its model_index.json is not"
                " true); leave it out, or use Wan2.2-TI2V"
            )
        if isinstance(params.image, list | tuple):
            raise InvalidRequestError(f"image: got a list of {len(params.image)}, expected one, the first frame")
        return image_size(params.image, limits, "image")

    def _check_size(self, params: DiffusionParams, picture: tuple[int, int] | None, limits: LimitsConfig) -> None:
        size, num_frames, step = self.geometry.size(params, picture), self.geometry.num_frames(params), self.geometry
        check_size(size, self.geometry.multiples, limits)
        check_limit("num_frames", num_frames, 1, limits.max_frames, integer=True)
        if (num_frames - 1) % step.frame_scale:
            below = (num_frames - 1) // step.frame_scale * step.frame_scale + 1
            raise InvalidRequestError(
                f"num_frames: got {num_frames}, expected one more than a multiple of {step.frame_scale}:"
                f" {below} or {below + step.frame_scale}"
            )
        total = (params.num_outputs or 1) * num_frames * size[0] * size[1]
        check_limit("num_outputs * num_frames * height * width", total, 1, limits.max_total_pixels)
        tokens = zip(step.latent_size(params, size), self.config.patch_size, strict=True)
        for name, (side, patch) in zip(("num_frames", "height", "width"), tokens, strict=True):
            if side // patch > self.config.rope_max_seq_len:
                raise InvalidRequestError(
                    f"{name}: got so much that there are {side // patch} tokens along this axis, expected at most"
                    f" {self.config.rope_max_seq_len}, the model's own limit"
                )


def _check_one_expert(index: Mapping[str, Any], where: str) -> None:
    """ConfigError for a checkpoint of two transformers, each for some of the steps."""
    second = index.get("transformer_2")
    has_second = isinstance(second, list) and any(part is not None for part in second)
    if has_second or index.get("boundary_ratio") is not None:
        raise ConfigError(
            f"{where}: boundary_ratio: got {brief(index.get('boundary_ratio'))}, expected none: a second transformer"
            " for the last steps (Wan 2.2 A14B) is not computed here; use kind: diffusers, which hosts such pipelines"
        )
