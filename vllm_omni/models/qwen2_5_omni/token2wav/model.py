"""Qwen2.5-Omni's token2wav as a DiffusionModel: the talker's codes become a 24 kHz waveform.

`num_inference_steps` counts the time points of the flow (10); between two of them lie four evaluations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_omni.errors import StageError
from vllm_omni.layers.weights import Target
from vllm_omni.models.qwen2_5_omni.speakers import Speakers
from vllm_omni.models.qwen2_5_omni.token2wav.bigvgan import BigVGAN
from vllm_omni.models.qwen2_5_omni.token2wav.config import SAMPLE_RATE, Token2WavConfig
from vllm_omni.models.qwen2_5_omni.token2wav.frames import Frames
from vllm_omni.models.qwen2_5_omni.token2wav.trajectory import (
    MAIN,
    NULL,
    Token2WavTrajectory,
    guidance_scale,
    is_guided,
    num_points,
)
from vllm_omni.models.qwen2_5_omni.token2wav.transformer import Condition, Token2WavTransformer, Voice
from vllm_omni.params import DiffusionParams
from vllm_omni.payload import StreamChunk
from vllm_omni.worker.diffusion.diffusion_model import DiffusionModel
from vllm_omni.worker.diffusion.encoded_images import EncodedImages

PREFIX = "token2wav."
DIT_PREFIX = PREFIX + "code2wav_dit_model."
LAYERS_PREFIX = DIT_PREFIX + "transformer_blocks."
VOCODER_PREFIX = PREFIX + "code2wav_bigvgan_model."
BUFFERS = (".filter", ".inv_freq")


@dataclass(frozen=True, slots=True, eq=False)
class ChunkCondition:
    """What trajectories of one chunk read."""

    voice: Voice
    context: Tensor  # [T, D] of the guided branch
    start: int  # the first mel frame of the context, counted from the beginning of the speech
    kept: slice  # the frames of the context that are the result


class Token2WavModules(nn.Module):
    """Both networks, as they are loaded."""

    def __init__(self, config: Token2WavConfig) -> None:
        super().__init__()
        self.transformer = Token2WavTransformer(config.dit)
        self.vocoder = BigVGAN(config.vocoder)

    def locate(self, name: str) -> Target | None:
        """Published name -> parameter here (see layers/weights.py)."""
        if name.startswith(VOCODER_PREFIX):
            return Target("vocoder." + name.removeprefix(VOCODER_PREFIX))
        if not name.startswith(DIT_PREFIX):
            return None
        target = self.transformer.locate(name.removeprefix(DIT_PREFIX))
        return None if target is None else Target("transformer." + target.parameter, target.rows)

    def is_ignored(self, name: str) -> bool:
        """The other parts of the folder, and constants that some checkpoints hold."""
        return not name.startswith(PREFIX) or name.endswith(BUFFERS)


class Token2Wav(DiffusionModel):
    """Made by `Token2WavSpec.load`.

    The codes come chunk by chunk, a whole payload being one chunk. A chunk is a trajectory over its context, its new
    codes and its look-ahead, all at their places in the whole speech: the same block grid, positions and noise. Context
    to the left is cut to whole blocks.

    What a frame depends on: one evaluation sees `blocks_back` blocks back and `blocks_ahead` ahead (published: 2 and 1,
    of 12 codes each, from two layers that look back and one that looks ahead), and each evaluation reads what the one
    before it made, so 36 of them see 72 blocks back and 36 ahead (17.3 s and 8.6 s), and the vocoder adds a few frames.
    With that much context chunks equal the whole; with less they come near it.
    """

    output_port = "audio"
    streamed_input = "codes"

    def __init__(self, config: Token2WavConfig, modules: Token2WavModules, speakers: Speakers) -> None:
        self.config = config
        self.transformer, self.vocoder = modules.transformer, modules.vocoder
        self.speakers = speakers
        self.num_blocks = config.dit.num_hidden_layers
        self.token_bytes = config.dit.hidden_size * self.transformer.dtype.itemsize
        self._device = self.transformer.proj.weight.device
        with torch.inference_mode():
            self._voices = {name: self.transformer.encode_voice(speakers.get(name)) for name in speakers.names}

    def prepare(self, inputs: Mapping[str, Any], params: DiffusionParams, seed: int, encoded: EncodedImages) -> Voice:
        return self._voices[self.speakers.resolve(inputs.get("speaker"))]

    def prepare_chunk(self, prepared: Voice, chunk: StreamChunk) -> ChunkCondition:
        self._check_codes(chunk)
        first, grid = chunk.start - chunk.num_before, self.config.dit.codes_per_grid
        start = -(-first // grid) * grid
        if start > chunk.start:  # not one whole block of context
            start = first
        repeats = self.config.dit.repeats
        kept = slice((chunk.start - start) * repeats, (chunk.stop - start) * repeats)
        context = self.transformer.encode_codes(chunk.rows[start - first :].to(self._device, torch.int64), prepared)
        return ChunkCondition(prepared, context, start * repeats, kept)

    def trajectory(self, prepared: ChunkCondition, params: DiffusionParams) -> Token2WavTrajectory:
        conditions = {MAIN: Condition(prepared.context, prepared.start)}
        if is_guided(params):
            conditions[NULL] = Condition(prepared.voice.null.expand_as(prepared.context), prepared.start)
        return Token2WavTrajectory(
            conditions,
            prepared.kept,
            num_points(params),
            guidance_scale(params),
            self.config.dit.mel_dim,
        )

    def embed(self, latents: Sequence[Tensor], timesteps: Sequence[float], conditions: Sequence[Condition]) -> Frames:
        return self.transformer.embed(latents, timesteps, conditions)

    def run_blocks(self, tokens: Frames, start: int, stop: int) -> Frames:
        return self.transformer.run_blocks(tokens, start, stop)

    def unembed(self, tokens: Frames) -> list[Tensor]:
        return self.transformer.unembed(tokens)

    def num_pieces(self, latents: Tensor, kept: slice) -> int:
        return self.vocoder.num_pieces(len(latents[kept]))

    def decode(self, latents: Tensor, kept: slice) -> Iterator[Tensor]:
        return self.vocoder.decode(latents, kept)

    def assemble(self, pieces: Sequence[Tensor], params: DiffusionParams) -> Tensor:
        audio = torch.cat(list(pieces), dim=1)
        if not bool(torch.isfinite(audio).all()):
            raise StageError("the sound is not finite; the vocoder's weights are damaged")
        return audio

    def meta(self, params: DiffusionParams) -> Mapping[str, Any]:
        return {"sample_rate": SAMPLE_RATE}

    def _check_codes(self, chunk: StreamChunk) -> None:
        """StageError for what the embedding table or the positions do not hold."""
        codes, largest = chunk.rows, self.config.dit.num_embeds
        if codes.dim() != 1 or codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise StageError(f"codes: got {codes.dtype} {list(codes.shape)}, expected integers [n]")
        low, high = codes.aminmax()
        if low < 0 or high > largest:
            raise StageError(f"codes: got values from {int(low)} to {int(high)}, expected 0 to {largest}")
        if chunk.stop + chunk.num_after > self.config.max_codes:
            raise StageError(
                f"codes: got {chunk.stop + chunk.num_after}, expected at most {self.config.max_codes} (max_position_"
                "embeddings of the model); ask for a shorter answer"
            )
