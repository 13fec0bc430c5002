"""What is known of a published Qwen-Image folder before its weights are loaded, and what a request may ask of it: of
diffusers' QwenImagePipeline, which makes pictures of words, and of the pipelines that edit pictures by words.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.layers.meta_device import on_meta_device
from vllm_omni.layers.published_quantization import read_quantization
from vllm_omni.layers.shard import ALONE, Shards
from vllm_omni.layers.weights import MakeCopies, allocate, load_weights
from vllm_omni.media.image_input import image_size
from vllm_omni.models.qwen_image.config import QwenImageConfig
from vllm_omni.models.qwen_image.geometry import EDITED_AREA, ImageGeometry
from vllm_omni.models.qwen_image.pipeline import PORTS, QwenImagePipeline, sources
from vllm_omni.models.qwen_image.trajectory import (
    DEFAULT_GUIDANCE,
    DEFAULT_STEPS,
    guidance_scale,
    is_guided,
    num_steps,
)
from vllm_omni.models.qwen_image.transformer import QwenImageTransformer
from vllm_omni.models.qwen_image.vae import PictureVae, VaeConfig
from vllm_omni.params import DiffusionParams
from vllm_omni.payload import StageSignature, TensorSpec
from vllm_omni.request import OmniRequest
from vllm_omni.utils.files import read_json
from vllm_omni.worker.diffusion.flow_sampler import read_flow_sampler
from vllm_omni.worker.diffusion.flow_trajectory import NEGATIVE, POSITIVE
from vllm_omni.worker.diffusion.preview_map import PreviewMap
from vllm_omni.worker.diffusion.request_checks import check_negative, check_scale, check_size, check_unread
from vllm_omni.worker.diffusion.shared_model import SharedModelSpec
from vllm_omni.worker.diffusion.source_image import check_source, first_step
from vllm_omni.worker.diffusion.tiling import DecodingSize

MAX_EDITED = 8  # pictures of one request; each is as many tokens as a picture of 1024 x 1024 pixels
# Hidden states, their normed copy, the feed-forward's input and what is made of it (4 each).
ACTIVATION_WIDTHS = 10


class QwenImageSpec(SharedModelSpec):
    """Text to image, image to image, inpainting: diffusers' QwenImagePipeline and the two beside it."""

    gives_previews = True
    can_quantize = True
    can_offload = True
    packs_vae = True
    adapted_part = "transformer"
    request_keys = frozenset({"image", "mask", "strength"})
    media_keys = frozenset({"image", "mask"})
    unused_fields: ClassVar[tuple[str, ...]] = ("duration_s",)
    max_edited: ClassVar[int] = 0  # pictures that a request may bring to be edited; 0: it may bring one to start from

    parallel_axes: ClassVar[tuple[str, ...]] = ("tensor", "guidance")
    shared_parts = ("time_embedder", "blocks")  # references may stand still in time

    def __init__(self, folder: Path, weights_variant: str | None = None) -> None:
        super().__init__(folder, weights_variant)
        self.defaults = {"num_inference_steps": DEFAULT_STEPS, "guidance_scale": DEFAULT_GUIDANCE}
        self.weight_folders = [folder / part for part in ("transformer", "vae")]
        config_file = folder / "transformer" / "config.json"
        self.config = QwenImageConfig.from_folder(folder / "transformer")
        self._published_quantization = read_quantization(read_json(config_file), str(config_file))
        self.vae_config = VaeConfig.from_folder(folder / "vae")
        if self.vae_config.num_channels != self.config.out_channels:
            raise ConfigError(
                f"{folder}/vae/config.json: z_dim: got {self.vae_config.num_channels}, expected the transformer's"
                f" out_channels, {self.config.out_channels}"
            )
        self.geometry = ImageGeometry(self.vae_config.scale)
        self.preview_map = PreviewMap.of_vae(folder / "vae")
        self.sampler_config = read_flow_sampler(folder / "scheduler")
        text = TensorSpec(("T", self.config.joint_attention_dim))
        self.signature = StageSignature(
            inputs=dict.fromkeys(PORTS.values(), text),
            outputs={"image": TensorSpec(("N", "H", "W", 3)), "latents": TensorSpec(("N", "C", "h", "w"))},
            required_inputs=frozenset({PORTS[POSITIVE]}),
            results=frozenset({"image"}),
        )

    def shared_counts(self) -> dict[str, dict[str, int]]:
        return {"tensor": {"heads": self.config.num_attention_heads, "widths of the feed-forward": 4 * self.config.dim}}

    def build_transformer(self, shards: Shards = ALONE) -> QwenImageTransformer:
        with on_meta_device():
            return QwenImageTransformer(self.config, shards)

    def published_quantization(self) -> str | None:
        return self._published_quantization

    def token_bytes(self, dtype: torch.dtype) -> int:
        return self.config.dim * dtype.itemsize * ACTIVATION_WIDTHS

    def decoding_size(self, dtype: torch.dtype) -> DecodingSize:
        return self.vae_config.decoding_size()

    def load(
        self,
        device: torch.device,
        dtype: torch.dtype,
        quantization: str | None = None,
        make_copies: MakeCopies | None = None,
        shards: Shards = ALONE,
    ) -> QwenImagePipeline:
        transformer = self.build_transformer(shards)
        allocate(transformer, device, dtype, quantization, make_copies)
        load_weights(transformer, self.folder / "transformer", variant=self.weights_variant)
        folder = self.folder / "vae"
        vae = PictureVae.load(folder, device, self.part_dtype(folder, dtype), self.weights_variant)
        return QwenImagePipeline(
            transformer, vae, self.sampler_config, self.geometry, self.preview_map, self.max_edited > 0
        )

    def check(
        self, request: OmniRequest, params: DiffusionParams, connected: frozenset[str], limits: LimitsConfig
    ) -> None:
        check_unread(params, self.unused_fields, "Qwen-Image")
        for name in params.extra or {}:
            raise InvalidRequestError(f"extra.{name}: unknown key; Qwen-Image reads none")
        size = self.geometry.size(params, self._check_pictures(params, limits))
        check_size(size, (self.geometry.multiple, self.geometry.multiple), limits)
        self._check_steps(params)
        check_scale(params, guidance_scale(params), num_steps(params), limits)
        check_negative(request, params, guidance_scale(params), PORTS[NEGATIVE], connected)

    def num_steps(self, params: DiffusionParams) -> int:
        return num_steps(params)

    def job_size(self, request: OmniRequest, params: DiffusionParams) -> float:
        height, width = self.geometry.size(params)
        pixels = height * width + (EDITED_AREA * len(sources(params)) if self.max_edited else 0)
        branches = 2 if is_guided(params) else 1
        steps = num_steps(params) - (0 if self.max_edited else first_step(params, num_steps(params)))
        return float(pixels * steps * branches * (params.num_outputs or 1)) * 1e-6

    def needed_inputs(self, connected: frozenset[str], request: OmniRequest, params: DiffusionParams) -> frozenset[str]:
        return connected if is_guided(params) else connected - {PORTS[NEGATIVE]}

    def note(self) -> str:
        made = "from a picture and within a mask" if self.max_edited == 0 else f"and edits up to {self.max_edited}"
        return f"Qwen-Image: makes pictures of words, {made}"

    def _check_pictures(self, params: DiffusionParams, limits: LimitsConfig) -> tuple[int, int] | None:
        """What the pictures of a request make of the size of what is made, None where it brings none; nothing is
        decoded.
        """
        if self.max_edited:
            return self._check_edited(params, limits)
        size = check_source(params, num_steps(params), limits)
        if size is None:
            return None
        height, width = self.geometry.source_size(*size)
        for name, side in (("height", height), ("width", width)):
            if side == 0 and getattr(params, name) is None:
                raise InvalidRequestError(
                    f"image: got {size[1]}x{size[0]} pixels, expected {self.geometry.multiple} a side, or {name} set"
                )
        return height, width

    def _check_edited(self, params: DiffusionParams, limits: LimitsConfig) -> tuple[int, int] | None:
        given, size = sources(params), None
        if params.image is not None and not 0 < len(given) <= self.max_edited:
            raise InvalidRequestError(f"image: got {len(given)}, expected 1 to {self.max_edited}")
        for name, source in given:
            height, width = image_size(source, limits, name)
            size = self.geometry.edited_size(height, width)
            if 0 in size:
                raise InvalidRequestError(
                    f"{name}: got {width}x{height} pixels, which is too narrow to be scaled to {EDITED_AREA} pixels;"
                    " crop or pad it"
                )
        return size

    def _check_steps(self, params: DiffusionParams) -> None:
        """A sampler that ends above 0 stretches its sigmas between two ends, which one step at noise has not."""
        is_noise_alone = num_steps(params) == 1 and (params.sigmas is None or params.sigmas[0] == 1)
        if is_noise_alone and self.sampler_config.get("shift_terminal"):
            raise InvalidRequestError("num_inference_steps: got 1, expected at least 2, which its sampler needs")


class QwenImageEditPlusSpec(QwenImageSpec):
    """Editing of one or several pictures, and text to image: diffusers' QwenImageEditPlusPipeline."""

    request_keys = frozenset({"image"})
    media_keys = frozenset({"image"})
    unused_fields = ("mask", "strength", "duration_s")
    max_edited = MAX_EDITED


class QwenImageEditSpec(QwenImageEditPlusSpec):
    """Editing of one picture: diffusers' QwenImageEditPipeline."""

    max_edited = 1
