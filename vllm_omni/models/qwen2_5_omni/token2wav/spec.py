"""What is known of the token2wav part of a published Qwen2.5-Omni folder before its weights are loaded, and what a
request may ask of it.

Only the part's tensors (`token2wav.*`) are read. It computes in float32, as the reference implementation forces it to,
unless its stage names another dtype: then the transformer's layers are of that.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import CheckpointError, InvalidRequestError
from vllm_omni.layers.meta_device import give_memory, on_meta_device
from vllm_omni.layers.weights import MakeCopies, load_weights, tensor_shapes
from vllm_omni.models.qwen2_5_omni.speakers import Speakers
from vllm_omni.models.qwen2_5_omni.token2wav.config import DiTConfig, Token2WavConfig
from vllm_omni.models.qwen2_5_omni.token2wav.model import LAYERS_PREFIX, PREFIX, Token2Wav, Token2WavModules
from vllm_omni.models.qwen2_5_omni.token2wav.trajectory import EVALUATIONS, guidance_scale, is_guided, num_points
from vllm_omni.params import DiffusionParams
from vllm_omni.payload import StageSignature, TensorSpec
from vllm_omni.request import OmniRequest
from vllm_omni.worker.diffusion.diffusion_model import DiffusionModelSpec, check_limit

MIN_POINTS = 2
TYPICAL_SECONDS = 10.0
UNUSED_FIELDS = (
    *("height", "width", "strength", "image", "sigmas", "negative_prompt", "guidance_interval", "duration_s", "extra"),
)


class Token2WavSpec(DiffusionModelSpec):
    """Codes to speech, in the voice that the request names."""

    request_keys = frozenset({"speaker"})
    auto_dtype = torch.float32

    def __init__(self, folder: Path, weights_variant: str | None = None) -> None:
        super().__init__(folder, weights_variant)
        self.weight_folders = [folder]
        self.config = Token2WavConfig.from_folder(folder)
        self.speakers = Speakers.load(folder)
        _check_speakers(self.speakers, self.config.dit, folder)
        self.signature = StageSignature(
            inputs={"codes": TensorSpec(("T",))},
            outputs={"audio": TensorSpec(("N", 1, "n")), "latents": TensorSpec(("N", "T", self.config.dit.mel_dim))},
            required_inputs=frozenset({"codes"}),
            results=frozenset({"audio"}),
            streamed_inputs=frozenset({"codes"}),
            streamed_outputs=frozenset({"audio"}),
        )

    def published_dtype(self) -> torch.dtype | None:
        return None  # `auto` is float32 whatever its files hold

    def weights_bytes(self, dtype: torch.dtype, quantization: str | None = None) -> int:
        shapes = tensor_shapes(self.folder, PREFIX, self.weights_variant)
        return sum(
            math.prod(shape) * (dtype if name.startswith(LAYERS_PREFIX) else torch.float32).itemsize
            for name, shape in shapes.items()
        )

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Hidden states, those before the step, their normed copy and what a layer adds; queries, keys and values,
        those once more as attention packs them, what it gives; and the feed-forward's.
        """
        config = self.config.dit
        heads = config.num_attention_heads * config.head_dim
        return ((4 + config.ff_mult) * config.hidden_size + 6 * heads) * dtype.itemsize

    def load(
        self,
        device: torch.device,
        dtype: torch.dtype,
        quantization: str | None = None,
        make_copies: MakeCopies | None = None,
    ) -> Token2Wav:
        with on_meta_device():
            modules = Token2WavModules(self.config)
        give_memory(modules, device)
        modules.float().requires_grad_(False).eval()
        modules.transformer.layers.to(dtype)
        modules.vocoder.fill_buffers()
        load_weights(modules, self.folder, variant=self.weights_variant)
        return Token2Wav(self.config, modules, self.speakers)

    def check(
        self, request: OmniRequest, params: DiffusionParams, connected: frozenset[str], limits: LimitsConfig
    ) -> None:
        for name in UNUSED_FIELDS:
            given = request.negative_prompt if name == "negative_prompt" else None
            value = given or getattr(params, name)
            if value is not None and not (isinstance(value, str) and not value):
                raise InvalidRequestError(f"{name}: token2wav makes sound of codes and does not read it; leave it out")
        if params.output_type == "pil":
            raise InvalidRequestError("output_type: got 'pil', which is for pictures; leave it unset for sound")
        check_limit("num_inference_steps", num_points(params), MIN_POINTS, limits.max_inference_steps, integer=True)
        check_limit("guidance_scale", guidance_scale(params), 0, limits.max_guidance_scale)
        self.speakers.resolve(request.fields.get("speaker"))

    def num_steps(self, params: DiffusionParams) -> int:
        """Time points."""
        return num_points(params)

    def job_size(self, request: OmniRequest, params: DiffusionParams) -> float:
        evaluations = EVALUATIONS * (num_points(params) - 1) * (2 if is_guided(params) else 1)
        return TYPICAL_SECONDS * evaluations * (params.num_outputs or 1) * 1e-2


def _check_speakers(speakers: Speakers, dit: DiTConfig, folder: Path) -> None:
    """CheckpointError for voices of other widths, or too short to be mirrored at their ends."""
    kinds = zip(dit.enc_kernel_sizes, dit.enc_dilations, strict=True)
    shortest = max((dilation * (kernel - 1) + 1) // 2 for kernel, dilation in kinds)
    for name in speakers.names:
        speaker = speakers.get(name)
        num_frames, width = speaker.ref_mel.shape
        if speaker.cond.shape != (dit.enc_emb_dim,) or width != dit.mel_dim or num_frames <= shortest:
            raise CheckpointError(
                f"{folder}: speaker {name!r}: got cond {list(speaker.cond.shape)} and ref_mel [{num_frames}, {width}],"
                f" expected [{dit.enc_emb_dim}] and [more than {shortest}, {dit.mel_dim}]"
            )
