"""A published ACE-Step 1.5 folder (diffusers AceStepPipeline) as a DiffusionModel: text to music, covers, repainting.

Native transformer and chunked autoencoder; condition encoder, audio tokenizer and sampler are diffusers'. Formulas and
defaults are those of diffusers' pipeline_ace_step. The texts, the sounds and the value of `music` come from the stage
kind `music_prompt`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import ConfigError, InvalidRequestError, StageError
from vllm_omni.layers.weights import weights_bytes
from vllm_omni.models.ace_step.conditioning import AceStepConditioner
from vllm_omni.models.ace_step.config import AceStepConfig
from vllm_omni.models.ace_step.frames import Condition, Frames
from vllm_omni.models.ace_step.oobleck import Oobleck
from vllm_omni.models.ace_step.sound_request import (
    DEFAULT_DURATION_S,
    REFERENCE_SECONDS,
    check_request,
    cover_strength,
    guidance_interval,
    guidance_scale,
    is_normalized,
    needed_ports,
    num_steps,
    shift_of,
)
from vllm_omni.models.ace_step.trajectory import MAIN, NULL, PLAIN, AceStepTrajectory, check_sampler, fresh_sampler
from vllm_omni.models.ace_step.transformer import AceStepTransformer
from vllm_omni.params import MAX_SEED, DiffusionParams
from vllm_omni.payload import DataSpec, StageSignature, TensorSpec, TextSpec
from vllm_omni.request import OmniRequest
from vllm_omni.utils.checks import check_number
from vllm_omni.utils.files import read_json
from vllm_omni.worker.diffusion.diffusion_model import DiffusionModel

PEAK = 10 ** (-1 / 20)  # -1 dBFS
QUIETEST = 1e-6


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all outputs of a request share. num_frames: latent frames of the result."""

    num_frames: int
    conditions: Mapping[str, Condition]
    cover_strength: float


class AceStepPipeline(DiffusionModel):
    """Made by `load`. A request's source and reference sounds are drawn from their posteriors with seed + 1."""

    output_port = "audio"

    def __init__(
        self,
        transformer: AceStepTransformer,
        vae: Oobleck,
        conditioner: AceStepConditioner,
        sampler_config: Mapping[str, Any],
    ) -> None:
        self.transformer = transformer
        self.vae = vae
        self.conditioner = conditioner
        self.is_turbo = transformer.config.is_turbo
        self.num_blocks = len(transformer.layers)
        self._sampler_config = sampler_config
        self._device = transformer.still_embedding.device
        with torch.inference_mode():
            self._null = None if self.is_turbo else transformer.encode_text(conditioner.null)

    @classmethod
    def signature(cls, folder: Path) -> StageSignature:
        words = TensorSpec(("T", _count(folder / "condition_encoder", "text_hidden_dim")))
        channels = _count(folder / "vae", "audio_channels")
        sound = TensorSpec((channels, "n"))
        return StageSignature(
            inputs={
                "prompt_embeds": words,
                "lyric_embeds": words,
                "plain_prompt_embeds": words,
                "music": DataSpec("music"),
                "source_audio": sound,
                "reference_audio": sound,
                "audio_codes": TextSpec(),
            },
            outputs={
                "audio": TensorSpec(("N", channels, "n")),
                "latents": TensorSpec(("N", "T", _count(folder / "vae", "decoder_input_channels"))),
            },
            required_inputs=frozenset({"prompt_embeds", "lyric_embeds", "music"}),
            results=frozenset({"audio"}),
        )

    @classmethod
    def needed_inputs(
        cls, folder: Path, connected: frozenset[str], request: OmniRequest, params: DiffusionParams
    ) -> frozenset[str]:
        return connected & needed_ports(request.fields)

    @classmethod
    def weights_bytes(cls, folder: Path, dtype: torch.dtype) -> int:
        conditioner = AceStepConditioner.weights_bytes(folder, dtype)
        return conditioner + sum(weights_bytes(folder / part, dtype.itemsize) for part in ("transformer", "vae"))

    @classmethod
    def token_bytes(cls, folder: Path, dtype: torch.dtype) -> int:
        """Hidden states, their normed copy and what a block adds; gate, up and their product, or queries, keys and
        values with their rotated copies, whichever is wider.
        """
        config = AceStepConfig.from_folder(folder / "transformer")
        heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        return (3 * config.hidden_size + max(3 * config.intermediate_size, 4 * heads)) * dtype.itemsize

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> AceStepPipeline:
        sampler = read_json(folder / "scheduler" / "scheduler_config.json")
        check_sampler(sampler, f"{folder}/scheduler")
        transformer = AceStepTransformer.load(folder / "transformer", device, dtype)
        vae = Oobleck.load(folder / "vae", device, dtype)
        channels = transformer.config.audio_acoustic_hidden_dim
        if vae.latent_channels != channels:
            raise ConfigError(
                f"{folder}/vae: decoder_input_channels: got {vae.latent_channels}, expected {channels} (audio_acoustic_"
                "hidden_dim of the transformer)"
            )
        num_timbre_frames = math.ceil(REFERENCE_SECONDS * vae.sample_rate / vae.geometry.hop)
        return cls(transformer, vae, AceStepConditioner.load(folder, num_timbre_frames, device, dtype), sampler)

    def check(
        self, request: OmniRequest, params: DiffusionParams, connected: frozenset[str], limits: LimitsConfig
    ) -> None:
        check_request(request, params, connected, limits, self.is_turbo, self.conditioner.can_tokenize)

    def num_steps(self, params: DiffusionParams) -> int:
        return num_steps(params)

    def job_size(self, request: OmniRequest, params: DiffusionParams) -> float:
        duration_s = params.duration_s or request.fields.get("duration_s") or DEFAULT_DURATION_S
        branches = 2 if guidance_scale(params, self.is_turbo) > 1 else 1
        seconds = float(duration_s) if isinstance(duration_s, int | float) else DEFAULT_DURATION_S
        return seconds * num_steps(params) * branches * (params.num_outputs or 1) * 1e-2

    def prepare(self, inputs: Mapping[str, Any], params: DiffusionParams, seed: int) -> Prepared:
        music = inputs["music"]
        if params.duration_s not in (None, music["duration_s"]):
            raise InvalidRequestError(
                f"duration_s: got {params.duration_s:g}, but the prompt is for {music['duration_s']:g} s;"
                " give duration_s in the prompt, or the same to every stage"
            )
        generator = torch.Generator().manual_seed((seed + 1) % (MAX_SEED + 1))
        source, is_cover = self._source(inputs, music, generator)
        timbre = self._timbre(inputs, music, generator)
        context = self.transformer.encode_context(self._masked(source, music))
        strength = cover_strength(music) if is_cover else 1.0
        conditions = self._conditions(inputs, timbre, context, strength)
        if guidance_scale(params, self.is_turbo) > 1 and self._null is not None:
            conditions[NULL] = Condition(self._null, context)
        return Prepared(len(source), conditions, strength)

    def trajectory(self, prepared: Prepared, params: DiffusionParams) -> AceStepTrajectory:
        return AceStepTrajectory(
            latent_shape=(prepared.num_frames, self.vae.latent_channels),
            sampler=fresh_sampler(
                self._sampler_config, num_steps(params), shift_of(params), params.sigmas, self._device
            ),
            conditions=prepared.conditions,
            guidance_scale=guidance_scale(params, self.is_turbo),
            interval=guidance_interval(params),
            cover_strength=prepared.cover_strength,
        )

    def begin(self, latents: Sequence[Tensor], timesteps: Sequence[float], conditions: Sequence[Condition]) -> Frames:
        levels = torch.tensor(timesteps, dtype=torch.float32, device=self._device)
        return self.transformer.begin(latents, levels, conditions)

    def run_blocks(self, tokens: Frames, start: int, stop: int) -> Frames:
        return self.transformer.run_blocks(tokens, start, stop)

    def finish(self, tokens: Frames) -> list[Tensor]:
        return [velocity.float() for velocity in self.transformer.finish(tokens)]

    def num_pieces(self, latents: Tensor, kept: slice) -> int:
        return self.vae.num_pieces(len(latents))

    def decode(self, latents: Tensor, kept: slice) -> Iterator[Tensor]:
        return self.vae.decode(latents)

    def assemble(self, pieces: Sequence[Tensor], params: DiffusionParams) -> Tensor:
        """Never beyond 1; with its peak at -1 dBFS unless `extra.normalize` is false."""
        audio = torch.cat(list(pieces), dim=1)
        peak = audio.abs().max()
        audio = audio / peak.clamp(min=1.0)
        return audio * (PEAK / peak.clamp(QUIETEST, 1.0)) if is_normalized(params) else audio

    def meta(self) -> Mapping[str, Any]:
        return {"sample_rate": self.vae.sample_rate}

    @property
    def _frames_per_s(self) -> float:
        return self.vae.sample_rate / self.vae.geometry.hop

    def _source(
        self, inputs: Mapping[str, Any], music: Mapping[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, bool]:
        """(latents [T, C] that the result follows, whether they make it a cover): of audio codes, else of the source
        sound, else of silence.
        """
        num_frames = math.ceil(music["duration_s"] * self._frames_per_s)
        codes = str(inputs.get("audio_codes") or "")
        if codes.strip() or music["has_audio_codes"]:
            max_codes = -(-num_frames // self.conditioner.frames_per_code)
            return self.conditioner.from_codes(codes, max_codes), music["task_type"] != "repaint"
        if music["has_source_audio"]:
            latents = self.vae.encode(self._given(inputs, "source_audio"), generator)
            is_cover = music["task_type"] == "cover"
            return (self.conditioner.retold(latents) if is_cover else latents), is_cover
        return self.conditioner.silence(num_frames), music["task_type"] == "cover"

    def _timbre(self, inputs: Mapping[str, Any], music: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """[1, E] of the reference sound: ten seconds each of its beginning, middle and end."""
        if not music["has_reference_audio"]:
            return self.conditioner.silent_timbre
        audio = self._given(inputs, "reference_audio")
        part = REFERENCE_SECONDS // 3 * self.vae.sample_rate
        audio = audio.repeat(1, max(1, -(-3 * part // audio.shape[1])))
        length = audio.shape[1]
        starts = (0, length // 3, length - part)
        excerpt = torch.cat([audio[:, start : start + part] for start in starts], dim=1)
        return self.conditioner.encode_timbre(self.vae.encode(excerpt, generator))

    def _masked(self, source: Tensor, music: Mapping[str, Any]) -> Tensor:
        """[T, 2 C]: source latents, and 1 where new sound is wanted; there the source of a repainting is silent."""
        num_frames, mask = len(source), torch.ones_like(source)
        if music["task_type"] == "repaint" and music["has_source_audio"]:
            start, end = music["repainting_start"] or 0.0, music["repainting_end"] or 0.0
            first = max(0, min(int(start * self._frames_per_s), num_frames - 1))
            last = int(end * self._frames_per_s) if end > 0 else num_frames
            mask[:first] = mask[max(first + 1, min(last, num_frames)) :] = 0.0
            source = torch.where(mask > 0.5, self.conditioner.silence(num_frames).to(source.dtype), source)
        return torch.cat([source, mask], dim=1)

    def _conditions(
        self, inputs: Mapping[str, Any], timbre: Tensor, context: Tensor, strength: float
    ) -> dict[str, Condition]:
        lyrics = self.conditioner.encode_lyrics(self._given(inputs, "lyric_embeds"))
        ports = {MAIN: "prompt_embeds", **({PLAIN: "plain_prompt_embeds"} if strength < 1 else {})}
        conditions = {}
        for branch, port in ports.items():
            states = torch.cat([lyrics, timbre, self.conditioner.encode_text(self._given(inputs, port))])
            conditions[branch] = Condition(self.transformer.encode_text(states), context)
        return conditions

    def _given(self, inputs: Mapping[str, Any], port: str) -> Tensor:
        if port not in inputs:
            raise StageError(f"{port}: not given, though this request reads it; connect the port in the config")
        return inputs[port].to(self._device)


def _count(folder: Path, key: str) -> int:
    """A width from the `config.json` of a part."""
    value: Any = read_json(folder / "config.json").get(key)
    check_number(f"{folder}/config.json: {key}", value, 1, integer=True, raises=ConfigError)
    return int(value)
