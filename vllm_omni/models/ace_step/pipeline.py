"""The running model of a published ACE-Step 1.5 folder (diffusers' AceStepPipeline): text to music, covers, repainting.

Native transformer and chunked autoencoder; condition encoder, audio tokenizer and sampler are diffusers'. Formulas and
defaults are those of diffusers' pipeline_ace_step. Words, audio and the value of `music` come from the stage kind
`music_prompt`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_omni.errors import InvalidRequestError, StageError
from vllm_omni.models.ace_step.conditioning import REFERENCE_SECONDS, AceStepConditioner
from vllm_omni.models.ace_step.frames import Frames, RowCondition
from vllm_omni.models.ace_step.geometry import MusicGeometry
from vllm_omni.models.ace_step.oobleck import Oobleck
from vllm_omni.models.ace_step.parameters import (
    guidance_scale,
    is_normalized,
    noise_interval,
    num_steps,
    shift_of,
)
from vllm_omni.models.ace_step.request import MusicOutline
from vllm_omni.models.ace_step.trajectory import MAIN, NULL, PLAIN, AceStepTrajectory, fresh_sampler
from vllm_omni.models.ace_step.transformer import AceStepTransformer
from vllm_omni.params import MAX_SEED, DiffusionParams
from vllm_omni.worker.diffusion.diffusion_model import DiffusionModel, check_finite
from vllm_omni.worker.diffusion.encoded_images import EncodedImages
from vllm_omni.worker.diffusion.guidance import guided_timesteps

PEAK = 10 ** (-1 / 20)  # -1 dBFS
QUIETEST = 1e-6


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all outputs of a request share."""

    num_frames: int  # latent frames of the result
    conditions: Mapping[str, RowCondition]  # by branch
    cover_strength: float


class AceStepPipeline(DiffusionModel):
    """Made by `AceStepSpec.load`. A request's source and reference latents are drawn from their posteriors with
    seed + 1.
    """

    output_port = "audio"
    gives_modulated_input = True

    def __init__(
        self,
        transformer: AceStepTransformer,
        vae: Oobleck,
        conditioner: AceStepConditioner,
        sampler_config: Mapping[str, Any],
        geometry: MusicGeometry,
    ) -> None:
        self.transformer = transformer
        self.vae = vae
        self.conditioner = conditioner
        self.is_turbo = transformer.config.is_turbo
        self.num_blocks = len(transformer.layers)
        self.token_bytes = transformer.config.hidden_size * transformer.still_embedding.element_size()
        self._sampler_config = sampler_config
        self._geometry = geometry
        self._device = transformer.still_embedding.device
        with torch.inference_mode():
            self._null = None if self.is_turbo else transformer.encode_text(conditioner.null)

    def is_heavy(self, inputs: Mapping[str, Any], params: DiffusionParams) -> bool:
        """Audio goes through the encoder of the autoencoder."""
        return any(inputs.get(port) is not None for port in ("source_audio", "reference_audio"))

    def prepare(
        self, inputs: Mapping[str, Any], params: DiffusionParams, seed: int, encoded: EncodedImages
    ) -> Prepared:
        outline = MusicOutline.from_json(inputs["music"])
        if params.duration_s not in (None, outline.duration_s):
            raise InvalidRequestError(
                f"duration_s: got {params.duration_s:g}, but the prompt is for {outline.duration_s:g} s;"
                " give duration_s in the prompt, or the same to every stage"
            )
        # 1 latents: the source's, then the reference's, from one generator
        generator = torch.Generator().manual_seed((seed + 1) % (MAX_SEED + 1))
        source = self._source(inputs, outline, generator)
        timbre = self._timbre(inputs, outline, generator)
        # 2 conditions of the branches that this request has
        context = self.transformer.encode_context(self._masked(source, outline))
        conditions = self._conditions(inputs, timbre, context, outline.cover_strength)
        if guidance_scale(params, self.is_turbo) > 1 and self._null is not None:
            conditions[NULL] = RowCondition(self._null, context)
        return Prepared(len(source), conditions, outline.cover_strength)

    def trajectory(self, prepared: Prepared, params: DiffusionParams) -> AceStepTrajectory:
        shift, sigmas = shift_of(params), params.sigmas
        sampler = fresh_sampler(self._sampler_config, num_steps(params), shift, sigmas, self._device)
        return AceStepTrajectory(
            latent_shape=(prepared.num_frames, self.vae.latent_channels),
            sampler=sampler,
            conditions=prepared.conditions,
            guidance_scale=guidance_scale(params, self.is_turbo),
            interval=noise_interval(params),
            guided=guided_timesteps(sampler.timesteps, params),
            cover_strength=prepared.cover_strength,
        )

    def embed(
        self, latents: Sequence[Tensor], timesteps: Sequence[float], conditions: Sequence[RowCondition]
    ) -> Frames:
        levels = torch.tensor(timesteps, dtype=torch.float32, device=self._device)
        return self.transformer.embed(latents, levels, conditions)

    def run_blocks(self, tokens: Frames, start: int, stop: int) -> Frames:
        return self.transformer.run_blocks(tokens, start, stop)

    def modulated_input(self, tokens: Frames) -> list[Tensor]:
        return self.transformer.modulated_input(tokens)

    def unembed(self, tokens: Frames) -> list[Tensor]:
        return [velocity.float() for velocity in self.transformer.unembed(tokens)]

    def num_pieces(self, latents: Tensor, kept: slice) -> int:
        return self.vae.num_pieces(len(latents))

    def decode(self, latents: Tensor, kept: slice) -> Iterator[Tensor]:
        return self.vae.decode(latents)

    def assemble(self, pieces: Sequence[Tensor], params: DiffusionParams) -> Tensor:
        """Never beyond 1; with its peak at -1 dBFS unless `extra.normalize` is false."""
        audio = torch.cat(list(pieces), dim=1)
        check_finite(audio, "the samples")
        peak = audio.abs().max()
        audio = audio / peak.clamp(min=1.0)
        return audio * (PEAK / peak.clamp(QUIETEST, 1.0)) if is_normalized(params) else audio

    def meta(self, params: DiffusionParams) -> Mapping[str, Any]:
        return {"sample_rate": self.vae.sample_rate}

    def _source(self, inputs: Mapping[str, Any], outline: MusicOutline, generator: torch.Generator) -> Tensor:
        """[T, C] latents that the result follows: of audio codes, else of the source audio, else of silence."""
        codes = str(inputs.get("audio_codes") or "")
        if codes.strip() or outline.has_audio_codes:
            return self.conditioner.from_codes(codes, self._geometry.num_codes(outline.num_frames))
        if outline.has_source_audio:
            latents = self.vae.encode(self._given(inputs, "source_audio"), generator)
            return self.conditioner.reconstruct_from_codes(latents) if outline.is_audio_cover else latents
        return self.conditioner.silence(outline.num_frames)

    def _timbre(self, inputs: Mapping[str, Any], outline: MusicOutline, generator: torch.Generator) -> Tensor:
        """[1, E] of the reference audio."""
        if not outline.has_reference_audio:
            return self.conditioner.silent_timbre
        excerpt = reference_excerpt(self._given(inputs, "reference_audio"), self._geometry.sample_rate)
        return self.conditioner.encode_timbre(self.vae.encode(excerpt, generator))

    def _masked(self, source: Tensor, outline: MusicOutline) -> Tensor:
        """[T, 2 C]: source latents, and 1 where new audio is wanted; there the source of a repainting is silent."""
        num_frames, mask = len(source), torch.ones_like(source)
        if outline.repaint_frames is not None:
            first, stop = outline.repaint_frames
            first = max(0, min(first, num_frames - 1))
            stop = num_frames if stop is None else stop
            mask[:first] = mask[max(first + 1, min(stop, num_frames)) :] = 0.0
            source = torch.where(mask > 0.5, self.conditioner.silence(num_frames).to(source.dtype), source)
        return torch.cat([source, mask], dim=1)

    def _conditions(
        self, inputs: Mapping[str, Any], timbre: Tensor, context: Tensor, strength: float
    ) -> dict[str, RowCondition]:
        lyrics = self.conditioner.encode_lyrics(self._given(inputs, "lyric_embeds"))
        ports = {MAIN: "prompt_embeds", **({PLAIN: "plain_prompt_embeds"} if strength < 1 else {})}
        conditions = {}
        for branch, port in ports.items():
            states = torch.cat([lyrics, timbre, self.conditioner.encode_text(self._given(inputs, port))])
            conditions[branch] = RowCondition(self.transformer.encode_text(states), context)
        return conditions

    def _given(self, inputs: Mapping[str, Any], port: str) -> Tensor:
        if port not in inputs:
            raise StageError(f"{port}: not given, though this request reads it; connect the port in the config")
        return inputs[port].to(self._device)


def reference_excerpt(audio: Tensor, sample_rate: int) -> Tensor:
    """[channels, n] -> what the timbre encoder hears: a third each of its beginning, middle and end, repeated where it
    is shorter.
    """
    part = REFERENCE_SECONDS // 3 * sample_rate
    audio = audio.repeat(1, max(1, -(-3 * part // audio.shape[1])))
    length = audio.shape[1]
    starts = (0, length // 3, length - part)
    return torch.cat([audio[:, start : start + part] for start in starts], dim=1)
