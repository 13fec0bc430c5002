"""All that is known of a published ACE-Step 1.5 folder before its weights are loaded: ports, sizes, what a request may
ask. Knows neither tensors nor formulas.
"""

from __future__ import annotations

from pathlib import Path

import torch

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.layers.published_quantization import read_quantization
from vllm_omni.layers.weights import MakeCopies
from vllm_omni.models.ace_step.conditioning import REFERENCE_SECONDS, AceStepConditioner
from vllm_omni.models.ace_step.config import AceStepConfig
from vllm_omni.models.ace_step.folder import AceStepFolder
from vllm_omni.models.ace_step.geometry import MusicGeometry
from vllm_omni.models.ace_step.oobleck import Oobleck, check_config
from vllm_omni.models.ace_step.parameters import (
    BASE_DEFAULTS,
    TURBO_DEFAULTS,
    check_params,
    guidance_scale,
    num_steps,
)
from vllm_omni.models.ace_step.pipeline import AceStepPipeline
from vllm_omni.models.ace_step.request import ALWAYS_NEEDED, MusicSources
from vllm_omni.models.ace_step.trajectory import check_sampler
from vllm_omni.models.ace_step.transformer import AceStepTransformer
from vllm_omni.params import DiffusionParams
from vllm_omni.payload import DataSpec, StageSignature, TensorSpec, TextSpec
from vllm_omni.request import OmniRequest
from vllm_omni.worker.diffusion.diffusion_model import DiffusionModelSpec

ENCODER = "condition_encoder"
TOKENIZER_PARTS = ("audio_tokenizer", "audio_token_detokenizer")
USUAL_DURATION_S = 60.0  # for the size of a job that does not say
STEP_SECONDS = 1e-2  # rough, of one denoising step of a second of audio


class AceStepSpec(DiffusionModelSpec):
    """Of a folder of diffusers' AceStepPipeline."""

    can_quantize = True
    can_offload = True

    def __init__(self, folder: Path, weights_variant: str | None = None) -> None:
        super().__init__(folder, weights_variant)
        self._folder = published = AceStepFolder(folder)
        raw, where = published.config("transformer"), str(published.config_file("transformer"))
        self._transformer = AceStepConfig.from_dict(raw, where)
        self._published_quantization = read_quantization(raw, where)
        self.defaults = TURBO_DEFAULTS if self._transformer.is_turbo else BASE_DEFAULTS
        self._geometry = MusicGeometry.from_folder(published)
        check_config(published.config("vae"), str(published.config_file("vae")))
        check_sampler(published.config("scheduler"), f"{folder}/scheduler")
        self._check_latents()
        self._coders = [part for part in TOKENIZER_PARTS if published.has_part(part)]
        self.weight_folders = [folder / part for part in ("transformer", "vae", ENCODER, *self._coders)]
        self._can_tokenize = len(self._coders) == len(TOKENIZER_PARTS)
        self.signature = self._signature()

    def build_transformer(self) -> AceStepTransformer:
        return AceStepTransformer.build(self._transformer)

    def published_quantization(self) -> str | None:
        return self._published_quantization

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Hidden states, their normed copy and what a block adds; gate, up and their product, or queries, keys and
        values with their rotated copies, whichever is wider.
        """
        config = self._transformer
        heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        return (3 * config.hidden_size + max(3 * config.intermediate_size, 4 * heads)) * dtype.itemsize

    def needed_inputs(self, connected: frozenset[str], request: OmniRequest, params: DiffusionParams) -> frozenset[str]:
        return connected & MusicSources.of(request.fields).needed_ports

    def check(
        self, request: OmniRequest, params: DiffusionParams, connected: frozenset[str], limits: LimitsConfig
    ) -> None:
        """The values of the request's own keys (`lyrics`, `audio`, ...) are checked by the stage that reads them."""
        if params.negative_prompt or request.negative_prompt:
            raise InvalidRequestError(
                "negative_prompt: ACE-Step guides away from a learned condition and does not read it; leave it out"
            )
        check_params(params, limits, self._transformer.is_turbo)
        sources = MusicSources.of(request.fields)
        if sources.is_cover and not self._can_tokenize:
            raise InvalidRequestError(
                f"task_type: a cover needs {' and '.join(TOKENIZER_PARTS)}, which the model's folder lacks; use a "
                "folder that has them"
            )
        if sources.is_weakened and "plain_prompt_embeds" not in connected:
            raise InvalidRequestError(
                f"audio_cover_strength: got {request.fields['audio_cover_strength']}, but the stage has no input"
                " plain_prompt_embeds; add the edge or leave it at 1"
            )

    def num_steps(self, params: DiffusionParams) -> int:
        return num_steps(params)

    def job_size(self, request: OmniRequest, params: DiffusionParams) -> float:
        given = params.duration_s or request.fields.get("duration_s")
        duration_s = float(given) if given and isinstance(given, int | float) else USUAL_DURATION_S
        num_branches = 2 if guidance_scale(params, self._transformer.is_turbo) > 1 else 1
        return duration_s * num_steps(params) * num_branches * (params.num_outputs or 1) * STEP_SECONDS

    def note(self) -> str:
        name = "ACE-Step turbo" if self._transformer.is_turbo else "ACE-Step base or sft"
        return f"{name} (by is_turbo and model_version of transformer/config.json)"

    def load(
        self,
        device: torch.device,
        dtype: torch.dtype,
        quantization: str | None = None,
        make_copies: MakeCopies | None = None,
    ) -> AceStepPipeline:
        path, variant = self.folder, self.weights_variant
        num_timbre_frames = self._geometry.num_frames(REFERENCE_SECONDS)
        return AceStepPipeline(
            AceStepTransformer.load(
                path / "transformer", self._transformer, device, dtype, variant, quantization, make_copies
            ),
            Oobleck.load(path / "vae", device, dtype, variant),
            AceStepConditioner.load(path, [ENCODER, *self._coders], num_timbre_frames, device, dtype, variant),
            self._folder.config("scheduler"),
            self._geometry,
        )

    def _check_latents(self) -> None:
        channels, expected = self._latent_channels, self._transformer.audio_acoustic_hidden_dim
        if channels != expected:
            raise ConfigError(
                f"{self._folder.path}/vae: decoder_input_channels: got {channels}, expected {expected} (audio_acoustic_"
                "hidden_dim of the transformer)"
            )

    @property
    def _latent_channels(self) -> int:
        return self._folder.count("vae", "decoder_input_channels")

    def _signature(self) -> StageSignature:
        words = TensorSpec(("T", self._folder.count(ENCODER, "text_hidden_dim")))
        channels = self._geometry.channels
        audio = TensorSpec((channels, "n"))
        return StageSignature(
            inputs={
                "prompt_embeds": words,
                "lyric_embeds": words,
                "plain_prompt_embeds": words,
                "music": DataSpec("music"),
                "source_audio": audio,
                "reference_audio": audio,
                "audio_codes": TextSpec(),
            },
            outputs={
                "audio": TensorSpec(("N", channels, "n")),
                "latents": TensorSpec(("N", "T", self._latent_channels)),
            },
            required_inputs=ALWAYS_NEEDED,
            results=frozenset({"audio"}),
        )
