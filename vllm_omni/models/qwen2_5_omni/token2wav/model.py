"""Qwen2.5-Omni's token2wav as a DiffusionModel: the talker's codes become a 24 kHz waveform.

A part of the published folder: only its tensors (`token2wav.*`) are read. It computes in float32 whatever dtype its
stage has, as the reference implementation forces it to. `num_inference_steps` counts the time points of the flow (10);
between two of them lie four evaluations.

The codes come chunk by chunk, a whole payload being one chunk. A chunk is a trajectory over its context, its new codes
and its look-ahead, all at their places in the whole sound: the same block grid, positions and noise. Context to the
left is cut to whole blocks. What a frame depends on: one evaluation sees `blocks_back` blocks back and `blocks_ahead`
ahead (published: 2 and 1, of 12 codes each, from two layers that look back and one that looks ahead), and each
evaluation reads what the one before it made, so 36 of them see 72 blocks back and 36 ahead (17.3 s and 8.6 s), and the
vocoder adds a few frames. With that much context chunks equal the whole; with less they come near it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import CheckpointError, InvalidRequestError, StageError
from vllm_omni.layers.weights import Target, load_weights, tensor_shapes
from vllm_omni.models.qwen2_5_omni.speakers import Speakers
from vllm_omni.models.qwen2_5_omni.token2wav.bigvgan import BigVGAN
from vllm_omni.models.qwen2_5_omni.token2wav.blocks import Blocks
from vllm_omni.models.qwen2_5_omni.token2wav.config import SAMPLE_RATE, DiTConfig, Token2WavConfig
from vllm_omni.models.qwen2_5_omni.token2wav.trajectory import (
    EVALUATIONS,
    MAIN,
    NEUTRAL_GUIDANCE,
    NULL,
    Token2WavTrajectory,
)
from vllm_omni.models.qwen2_5_omni.token2wav.transformer import Condition, Token2WavTransformer, Voice
from vllm_omni.params import DiffusionParams
from vllm_omni.payload import StageSignature, StreamChunk, TensorSpec
from vllm_omni.request import OmniRequest
from vllm_omni.worker.diffusion.diffusion_model import DiffusionModel, check_limit

PREFIX = "token2wav."
DIT_PREFIX = PREFIX + "code2wav_dit_model."
VOCODER_PREFIX = PREFIX + "code2wav_bigvgan_model."
BUFFERS = (".filter", ".inv_freq")
DEFAULT_POINTS = 10
MIN_POINTS = 2
DEFAULT_GUIDANCE = 0.5
TYPICAL_SECONDS = 10.0
UNUSED_FIELDS = ("height", "width", "strength", "image", "sigmas", "negative_prompt", "duration_s", "extra")


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """What trajectories of one chunk read. context: [T, D] of the guided branch, from mel frame `start` on, of which
    the frames `kept` are the result.
    """

    voice: Voice
    context: Tensor
    start: int
    kept: slice


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
    """Made by `load`."""

    output_port = "audio"
    streamed_input = "codes"

    def __init__(self, config: Token2WavConfig, modules: Token2WavModules, speakers: Speakers) -> None:
        self.config = config
        self.transformer, self.vocoder = modules.transformer, modules.vocoder
        self.speakers = speakers
        self.num_blocks = config.dit.num_hidden_layers
        self._device = self.transformer.proj.weight.device
        with torch.inference_mode():
            self._voices = {name: self.transformer.encode_voice(speakers.get(name)) for name in speakers.names}

    @classmethod
    def signature(cls, folder: Path) -> StageSignature:
        config = Token2WavConfig.from_folder(folder)
        return StageSignature(
            inputs={"codes": TensorSpec(("T",))},
            outputs={"audio": TensorSpec(("N", 1, "n")), "latents": TensorSpec(("N", "T", config.dit.mel_dim))},
            required_inputs=frozenset({"codes"}),
            results=frozenset({"audio"}),
            streamed_inputs=frozenset({"codes"}),
            streamed_outputs=frozenset({"audio"}),
        )

    @classmethod
    def needed_inputs(
        cls, folder: Path, connected: frozenset[str], request: OmniRequest, params: DiffusionParams
    ) -> frozenset[str]:
        return connected

    @classmethod
    def request_keys(cls, folder: Path) -> frozenset[str]:
        return frozenset({"speaker"})

    @classmethod
    def note(cls, folder: Path) -> str:
        return "token2wav holds its weights and computes in float32, whatever dtype says"

    @classmethod
    def weights_bytes(cls, folder: Path, dtype: torch.dtype) -> int:
        shapes = tensor_shapes(folder).items()
        return sum(math.prod(shape) * torch.float32.itemsize for name, shape in shapes if name.startswith(PREFIX))

    @classmethod
    def token_bytes(cls, folder: Path, dtype: torch.dtype) -> int:
        """Hidden states, their normed copy and what a layer adds; the feed-forward's twice, or queries, keys and values
        with those of the neighbours, whichever is wider.
        """
        config = Token2WavConfig.from_folder(folder).dit
        heads = config.num_attention_heads * config.head_dim
        widest = max(2 * config.ff_mult * config.hidden_size, 9 * heads)
        return (3 * config.hidden_size + widest) * torch.float32.itemsize

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> Token2Wav:
        """In float32; `dtype` is not asked (see the module)."""
        config, speakers = Token2WavConfig.from_folder(folder), Speakers.load(folder)
        _check_speakers(speakers, config.dit, folder)
        with torch.device("meta"):
            modules = Token2WavModules(config)
        modules.to_empty(device=device).float().requires_grad_(False).eval()
        modules.vocoder.settle()
        load_weights(modules, folder)
        return cls(config, modules, speakers)

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
        check_limit("num_inference_steps", self.num_steps(params), MIN_POINTS, limits.max_inference_steps, integer=True)
        check_limit("guidance_scale", _guidance(params), 0, limits.max_guidance_scale)
        self.speakers.resolve(request.fields.get("speaker"))

    def num_steps(self, params: DiffusionParams) -> int:
        """Time points."""
        return DEFAULT_POINTS if params.num_inference_steps is None else params.num_inference_steps

    def job_size(self, request: OmniRequest, params: DiffusionParams) -> float:
        evaluations = EVALUATIONS * (self.num_steps(params) - 1) * (2 if _is_guided(params) else 1)
        return TYPICAL_SECONDS * evaluations * (params.num_outputs or 1) * 1e-2

    def prepare(self, inputs: Mapping[str, Any], params: DiffusionParams, seed: int) -> Voice:
        return self._voices[self.speakers.resolve(inputs.get("speaker"))]

    def prepare_chunk(self, prepared: Voice, chunk: StreamChunk) -> Stretch:
        self._check_codes(chunk)
        first, grid = chunk.start - chunk.num_before, self.config.dit.codes_per_grid
        start = -(-first // grid) * grid
        if start > chunk.start:  # not one whole block of context
            start = first
        repeats = self.config.dit.repeats
        kept = slice((chunk.start - start) * repeats, (chunk.stop - start) * repeats)
        context = self.transformer.encode_codes(chunk.rows[start - first :].to(self._device, torch.int64), prepared)
        return Stretch(prepared, context, start * repeats, kept)

    def trajectory(self, prepared: Stretch, params: DiffusionParams) -> Token2WavTrajectory:
        conditions = {MAIN: Condition(prepared.context, prepared.start)}
        if _is_guided(params):
            conditions[NULL] = Condition(prepared.voice.null.expand_as(prepared.context), prepared.start)
        return Token2WavTrajectory(
            conditions,
            prepared.kept,
            self.num_steps(params),
            _guidance(params),
            self.config.dit.mel_dim,
        )

    def begin(self, latents: Sequence[Tensor], timesteps: Sequence[float], conditions: Sequence[Condition]) -> Blocks:
        times = torch.tensor(timesteps, dtype=torch.float32, device=self._device)
        return self.transformer.begin(latents, times, conditions)

    def run_blocks(self, tokens: Blocks, start: int, stop: int) -> Blocks:
        return self.transformer.run_blocks(tokens, start, stop)

    def finish(self, tokens: Blocks) -> list[Tensor]:
        return self.transformer.finish(tokens)

    def num_pieces(self, latents: Tensor, kept: slice) -> int:
        return self.vocoder.num_pieces(len(latents[kept]))

    def decode(self, latents: Tensor, kept: slice) -> Iterator[Tensor]:
        return self.vocoder.decode(latents, kept)

    def assemble(self, pieces: Sequence[Tensor], params: DiffusionParams) -> Tensor:
        sound = torch.cat(list(pieces), dim=1)
        if not bool(torch.isfinite(sound).all()):
            raise StageError("the sound is not finite; the vocoder's weights are damaged")
        return sound

    def meta(self) -> Mapping[str, Any]:
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


def _guidance(params: DiffusionParams) -> float:
    return DEFAULT_GUIDANCE if params.guidance_scale is None else params.guidance_scale


def _is_guided(params: DiffusionParams) -> bool:
    return _guidance(params) >= NEUTRAL_GUIDANCE
