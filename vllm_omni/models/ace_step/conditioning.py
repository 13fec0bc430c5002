"""What the ACE-Step 1.5 transformer is conditioned on: states of words, lyrics and timbre, and source latents.

Wraps the modules that diffusers publishes beside the transformer (condition encoder, audio tokenizer and detokenizer).
They run once per request, one request at a time, without padding.

Legend: t tokens of a text, W width of the text encoder, E width of the condition encoder, C latent channels, T latent
frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_omni.errors import InvalidRequestError
from vllm_omni.models.ace_step.audio_codes import find_codes
from vllm_omni.utils.checks import brief
from vllm_omni.worker.diffusion.published_part import load_part

REFERENCE_SECONDS = 30  # of audio that the timbre encoder hears


class AceStepConditioner:
    """Frozen; shared by all requests. tokenizer and detokenizer are None where a folder lacks them."""

    def __init__(self, encoder: Any, tokenizer: Any, detokenizer: Any, num_timbre_frames: int) -> None:
        self._encoder, self._tokenizer, self._detokenizer = encoder, tokenizer, detokenizer
        self._dtype = encoder.null_condition_emb.dtype
        with torch.inference_mode():
            self._silence: Tensor = encoder.silence_latent[0]  # [frames, C]
            self.silent_timbre = self.encode_timbre(self._silence[:num_timbre_frames])  # [1, E] without a reference
            self.null: Tensor = encoder.null_condition_emb[0]  # [1, E], learned: of the unguided branch

    @classmethod
    def load(
        cls,
        folder: Path,
        present: Sequence[str],
        num_timbre_frames: int,
        device: torch.device,
        dtype: torch.dtype,
        weights_variant: str | None = None,
    ) -> AceStepConditioner:
        """present: the parts that the folder has. num_timbre_frames: how much silence the timbre encoder hears where
        there is nothing else.
        """
        from diffusers.pipelines.ace_step import (
            AceStepAudioTokenDetokenizer,
            AceStepAudioTokenizer,
            AceStepConditionEncoder,
        )

        classes = {
            "condition_encoder": AceStepConditionEncoder,
            "audio_tokenizer": AceStepAudioTokenizer,
            "audio_token_detokenizer": AceStepAudioTokenDetokenizer,
        }
        encoder, tokenizer, detokenizer = (
            load_part(part, folder / name, dtype, weights_variant).to(device=device) if name in present else None
            for name, part in classes.items()
        )
        return cls(encoder, tokenizer, detokenizer, num_timbre_frames)

    def encode_text(self, embeds: Tensor) -> Tensor:
        """[t, W] last states of the caption -> [t, E]."""
        return self._encoder.text_projector(embeds.to(self._dtype))

    def encode_lyrics(self, embeds: Tensor) -> Tensor:
        """[t, W] token embeddings of the lyrics -> [t, E]."""
        is_token = torch.ones(1, len(embeds), dtype=torch.bool, device=embeds.device)
        return self._encoder.lyric_encoder(inputs_embeds=embeds[None].to(self._dtype), attention_mask=is_token)[0]

    def encode_timbre(self, latents: Tensor) -> Tensor:
        """[T, C] of the reference audio -> [1, E]."""
        one = torch.zeros(1, dtype=torch.long, device=latents.device)
        return self._encoder.timbre_encoder(latents[None].to(self._dtype), one)[0][0]

    def silence(self, num_frames: int) -> Tensor:
        """[num_frames, C] latents of silence, repeated where the published ones are shorter."""
        repeats = -(-num_frames // len(self._silence))
        return self._silence.repeat(repeats, 1)[:num_frames]

    def reconstruct_from_codes(self, latents: Tensor) -> Tensor:
        """[T, C] -> [T, C] through audio codes and back: what is sung and played, without its timbre."""
        quantized, _ = self._tokenizer.tokenize(latents[None].to(self._dtype), self._silence[None])
        return self._detokenizer(quantized.to(self._dtype))[0, : len(latents)]

    def from_codes(self, codes: str, max_codes: int) -> Tensor:
        """Words such as '<|audio_code_12|><|audio_code_7|>' -> latents [frames_per_code * codes, C]. Codes beyond the
        codebook are its last one, as in the reference; what a planner writes beyond `max_codes` is left out.
        """
        quantizer = self._tokenizer.quantizer
        numbers = [min(number, quantizer.codebook_size - 1) for number in find_codes(codes)[:max_codes]]
        if not numbers:
            raise InvalidRequestError(f"audio_codes: got {brief(codes)}, expected words such as '<|audio_code_12|>'")
        device = self._silence.device
        indices = torch.zeros(1, len(numbers), quantizer.num_quantizers, dtype=torch.long, device=device)
        indices[0, :, 0] = torch.tensor(numbers, device=device)
        return self._detokenizer(quantizer.get_output_from_indices(indices).to(self._dtype))[0]
