"""The two contracts of a diffusion model as a stage runs it, whatever it makes: a spec and a model for each published
pipeline.

A spec is known before loading, a model holds weights and formulas; neither knows a batching policy or a cache. A
Trajectory is one output's way from noise to latents. Shapes are without a batch dimension: latents are [C, h, w] for
pictures, [C, f, h, w] for videos and [T, C] for audio. Every tensor argument and result is on the model's device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import InvalidRequestError, StageError
from vllm_omni.layers import halves
from vllm_omni.layers.blocks import StreamedBytes
from vllm_omni.layers.native.convolution import NUM_WEIGHTS, Tile
from vllm_omni.layers.native.library import kernels
from vllm_omni.layers.weights import (
    MakeCopies,
    choose_numbers,
    saved_bytes,
    tensor_files,
    tensor_shapes,
    weights_bytes,
)
from vllm_omni.layers.weights_digest import weights_digest
from vllm_omni.params import DiffusionParams
from vllm_omni.payload import StageSignature, StreamChunk
from vllm_omni.request import OmniRequest
from vllm_omni.utils.checks import check_number
from vllm_omni.worker.diffusion.encoded_images import EncodedImages
from vllm_omni.worker.diffusion.sampler_state import restore_sampler, sampler_state
from vllm_omni.worker.diffusion.tiling import DecodingSize
from vllm_omni.worker.published_dtype import dtype_of_folders, dtypes_of_matrices

FINGERPRINT_DIGITS = 16  # hexadecimal


class Sampler(Protocol):
    """A diffusers scheduler with its own state, one per output of a request."""

    timesteps: Tensor

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool) -> tuple[Tensor, ...]:
        """[1, *latent_shape] at this timestep -> the sample at the next one."""


class TokenBatch(Protocol):
    """All rows of a batch between two blocks."""

    def per_row(self) -> list[Tensor]:
        """[L, D] views, in packed order."""

    def select(self, rows: Sequence[int]) -> TokenBatch:
        """Some packed rows, ascending, as a batch of their own."""

    def with_rows(self, rows: Sequence[Tensor]) -> TokenBatch:
        """The same batch with other hidden states, packed order."""

    @property
    def order(self) -> tuple[int, ...]:
        """Packed row -> the row that `embed` was given."""

    @property
    def packings(self) -> Sequence[Sequence[int]]:
        """How many rows each packed row has, in every packing that layers of blocks see: of a transformer with two
        streams its tokens of text, of images, and of both; ones, where a layer computes from the timestep. Read only
        where adapters act. `embed` and `unembed` say theirs by `layers.lora.packed`.
        """


class Trajectory(ABC):
    """One output's way from noise to latents. All that changes on it is its own: nothing is shared but weights and
    what `prepare` made.
    """

    latent_shape: tuple[int, ...]  # of the noise it starts from
    sampler: Sampler  # its timesteps are set
    num_tokens: int  # of all its branches in one step
    start: int = 0  # the first of the sampler's steps that is computed: what starts from a picture leaves some out
    conditions: Mapping[str, Any]  # branch -> what `embed` takes for the row of that branch
    kept: slice = slice(None)  # the rows of the latents that are the result; the others are its context

    @property
    def timesteps(self) -> Tensor:
        """Of the steps that are computed."""
        return self.sampler.timesteps[self.start :]

    def noise(self, generator: torch.Generator) -> Tensor:
        """What it starts from: standard normal float32 `latent_shape`, or that mixed with a picture. Drawn on the CPU,
        so that a seed means the same on every device. A sampler that draws while it goes draws on from the same
        generator. Called once, before the first step.
        """
        return torch.randn(self.latent_shape, generator=generator, dtype=torch.float32)

    @abstractmethod
    def branches(self, timestep: float) -> tuple[str, ...]:
        """Which branches act at this timestep, the main one first. Asking changes nothing."""

    @abstractmethod
    def combine(self, outputs: Sequence[Tensor], timestep: float) -> Tensor:
        """The outputs of `branches(timestep)`, in order, each `latent_shape` -> what the sampler takes.

        Called exactly once per denoising step, so it may keep state of its own (a guidance momentum).
        """

    def constrain(self, latents: Tensor, step: int) -> Tensor:
        """What the next step starts from, of what the sampler gave in this one (counted from `start`): the same, unless
        some of it is known beforehand, as what a mask keeps.
        """
        return latents

    def state(self) -> Mapping[str, Any]:
        """All that changes on it from step to step: tensors, numbers and lists of them by name. Of its sampler alone by
        default; one that keeps more (an average over steps) adds that here and in `restore`. StageError where it cannot
        be said.
        """
        return sampler_state(self.sampler)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Makes a fresh trajectory what another of the same request was at `state`; InvalidRequestError where that does
        not fit it.
        """
        restore_sampler(self.sampler, state, self.latent_shape, len(self.sampler.timesteps))

    def estimate(self, latents: Tensor, output: Tensor, step: int) -> Tensor:
        """What the latents will be at the end, judged by this step (counted from `start`) alone: `latents` before it,
        and the output that its sampler takes. Only where the spec `gives_previews`.
        """
        raise StageError(f"{type(self).__name__} gives no previews")


class DiffusionModelSpec(ABC):
    """All that is known of a checkpoint before its weights are loaded: one implementation per published pipeline.
    Constructing it reads the folder's JSON files, once; safe to ask from any thread.
    """

    signature: StageSignature  # outputs are `output_port` [N, ...] and "latents" [N, ...]; the result is `output_port`
    weight_folders: Sequence[Path]  # of the parts that are loaded, the transformer's first
    # keys of `OmniRequest.fields` that it reads: `prepare` is given them, those that DiffusionParams has as well
    # (`image`, `mask`, `strength`) in the parameters
    request_keys: frozenset[str] = frozenset()
    media_keys: frozenset[str] = frozenset()  # of them those that hold pictures or sounds
    gives_previews: ClassVar[bool] = False  # whether its running samples can be shown (`DiffusionModel.preview`)
    auto_dtype: ClassVar[torch.dtype | None] = None  # what `dtype: auto` means for it; None: what it means elsewhere
    can_quantize: ClassVar[bool] = False  # whether weights within its blocks may be held in 8 bits
    can_offload: ClassVar[bool] = False  # whether weights of its blocks may wait in the host's memory
    packs_vae: ClassVar[bool] = False  # whether the kernels of a CPU hold the convolutions of its folder `vae` packed
    adapted_part: ClassVar[str | None] = None  # the folder of the transformer, where LoRA may adapt it
    defaults: Mapping[str, Any] = {}  # of DiffusionParams, as this checkpoint (a distilled one, say) wants them
    frame_rate: float | None = None  # frames per second of its videos, where the request says none; None: it makes none

    def __init__(self, folder: Path, weights_variant: str | None = None) -> None:
        """weights_variant: which weight files are loaded ("fp16"), of a part that has such."""
        self.folder = folder
        self.weights_variant = weights_variant

    def weights_bytes(self, dtype: torch.dtype, quantization: str | None = None) -> int:
        """Bytes of all weights, from the safetensors headers. quantization: what those are held in that can be."""
        total = sum(
            weights_bytes(folder, self.part_dtype(folder, dtype).itemsize, variant=self.weights_variant)
            for folder in self.weight_folders
        )
        return (
            total
            if quantization is None
            else total - saved_bytes(self.build_transformer(), dtype.itemsize, quantization)
        )

    def packing_bytes(self, dtype: torch.dtype) -> int:
        """By which what the kernels of a CPU hold of its VAE is more than its weights: at most so many."""
        folder = self.folder / "vae"
        dtype = self.part_dtype(folder, dtype)
        if not self.packs_vae or kernels(dtype) is None:
            return 0
        shapes = tensor_shapes(folder, variant=self.weights_variant).values()
        filters = [shape for shape in shapes if shape[-2:] == (3, 3)]
        more = sum(math.prod(shape[:-2]) * (Tile.of(shape, dtype).num_products - NUM_WEIGHTS) for shape in filters)
        return more * dtype.itemsize

    def streamed_bytes(self, dtype: torch.dtype, quantization: str | None = None) -> StreamedBytes:
        """Of its blocks, where they are streamed."""
        transformer = self.build_transformer()
        choose_numbers(transformer, dtype, quantization)
        return StreamedBytes.of(transformer)

    def part_dtype(self, folder: Path, dtype: torch.dtype) -> torch.dtype:
        """What the part in one of `weight_folders` is held in, in a stage of this dtype."""
        return dtype

    def build_transformer(self) -> nn.Module:
        """What of it can be quantised, adapted or streamed, on the meta device."""
        raise NotImplementedError(f"{type(self).__name__}: can_quantize or adapted_part, but no build_transformer")

    def lora_aliases(self) -> Mapping[str, str]:
        """What LoRA files call layers of the transformer besides their published names -> these, or their paths in
        it.
        """
        return {}

    def published_dtype(self) -> torch.dtype | None:
        """What most of these weights were published in, from the headers; None where nothing says."""
        return dtype_of_folders(self.weight_folders, self.weights_variant)

    def keeps_halves(self) -> bool:
        """Whether all matrices of the transformer are stored in bfloat16, and are multiplied so beside float32."""
        files = tensor_files(self.weight_folders[0], variant=self.weights_variant).values()
        return halves.is_fast() and dtypes_of_matrices(files) == {torch.bfloat16}

    def published_quantization(self) -> str | None:
        """ "int8" or "float8", where the blocks' weights were published so."""
        return None

    @abstractmethod
    def token_bytes(self, dtype: torch.dtype) -> int:
        """Activation bytes of one token at the widest moment of a block."""

    def decoding_size(self, dtype: torch.dtype) -> DecodingSize | None:
        """What decoding a picture, or a frame of latents, takes; where it has a `tile`, large ones can be decoded in
        tiles (`DiffusionModel.decode_pixels`). None for a decoder that bounds its memory itself.
        """
        return None

    @abstractmethod
    def load(
        self,
        device: torch.device,
        dtype: torch.dtype,
        quantization: str | None = None,
        make_copies: MakeCopies | None = None,
    ) -> DiffusionModel:
        """The model, its checkpoint read. quantization: what weights are held in that can be. make_copies: what brings
        the weights of its blocks to the device, where they wait elsewhere and it `can_offload`.
        """

    @abstractmethod
    def check(
        self, request: OmniRequest, params: DiffusionParams, connected: frozenset[str], limits: LimitsConfig
    ) -> None:
        """Raises InvalidRequestError for what the model cannot run: sizes or duration, guidance, extra keys. connected:
        the input ports that have an edge.
        """

    @abstractmethod
    def num_steps(self, params: DiffusionParams) -> int:
        """Denoising steps, the model's own number where the request names none."""

    @abstractmethod
    def job_size(self, request: OmniRequest, params: DiffusionParams) -> float:
        """Rough seconds-like size of the whole request; only the order matters."""

    def needed_inputs(self, connected: frozenset[str], request: OmniRequest, params: DiffusionParams) -> frozenset[str]:
        """Of the connected input ports, those that this request makes the model read."""
        return connected

    def fingerprint(self) -> str:
        """Tells the transformer's weights from all others. Reads some of them."""
        transformer = self.weight_folders[0]
        return weights_digest(transformer, [transformer], self.weights_variant)[:FINGERPRINT_DIGITS]

    def note(self) -> str:
        """What `vllm-omni check` should say of the model; empty for nothing."""
        return ""


class DiffusionModel(ABC):
    """Weights and formulas of one checkpoint."""

    output_port: ClassVar[str]  # what it makes: "image", "video" or "audio"
    streamed_input: ClassVar[str | None] = None  # the input port, if any, that it takes chunk by chunk
    gives_modulated_input: ClassVar[bool] = False  # whether step caches may ask for `modulated_input`
    num_blocks: int  # how many `run_blocks` counts
    token_bytes: int  # of one token's hidden state between two blocks

    def is_heavy(self, inputs: Mapping[str, Any], params: DiffusionParams) -> bool:
        """Whether `prepare` encodes media (source audio, a picture): at most one such task is prepared per step."""
        return params.image is not None

    @abstractmethod
    def prepare(self, inputs: Mapping[str, Any], params: DiffusionParams, seed: int, encoded: EncodedImages) -> Any:
        """What all outputs of a request read: conditions encoded, source latents. Called once per request, as a step of
        its own; inputs: by port (without the streamed one) and by request key (None where the request has none).
        encoded: reads the pictures of the parameters, and keeps what is made of them for later requests.
        """

    def prepare_chunk(self, prepared: Any, chunk: StreamChunk) -> Any:
        """What `trajectory` reads for one chunk of `streamed_input`, at least one of its rows being new. prepared: what
        `prepare` gave.
        """
        raise StageError(f"{type(self).__name__} takes nothing chunk by chunk")

    @abstractmethod
    def trajectory(self, prepared: Any, params: DiffusionParams) -> Trajectory:
        """A fresh trajectory of what `prepare`, or `prepare_chunk`, gave. Called once per output and chunk."""

    def adapted(self) -> nn.Module:
        """What LoRA adapts. Only where the spec names an `adapted_part`."""
        raise StageError(f"{type(self).__name__} has nothing that LoRA could adapt")

    @abstractmethod
    def embed(self, latents: Sequence[Tensor], timesteps: Sequence[float], conditions: Sequence[Any]) -> TokenBatch:
        """Rows before the first block, each at its own timestep: float32 latents, timesteps of their samplers."""

    @abstractmethod
    def run_blocks(self, tokens: Any, start: int, stop: int) -> TokenBatch:
        """Blocks start .. stop - 1."""

    def modulated_input(self, tokens: Any) -> list[Tensor]:
        """[L, D] per packed row: what block 0 computes with, normed and modulated by the timestep. Only where
        `gives_modulated_input`.
        """
        raise StageError(f"{type(self).__name__} gives no modulated input; choose another cache.policy")

    @abstractmethod
    def unembed(self, tokens: Any) -> list[Tensor]:
        """The rows' outputs, float32 and shaped as their latents, in `embed`'s order of rows."""

    def num_pieces(self, latents: Tensor, kept: slice) -> int:
        """How many pieces `decode` gives for such latents, at least 1."""
        return 1

    @abstractmethod
    def decode(self, latents: Tensor, kept: slice) -> Iterator[Tensor]:
        """The result piece by piece, in order; each is computed when it is asked for. A picture is one piece. kept: the
        trajectory's; where it is not everything, only chunks make it so (see `streamed_input`).
        """

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """[C, h, w], of a picture or of a part of one -> [3, H, W] float32, 0 to 1 being what can be shown. Only where
        the spec has a `decoding_size`.
        """
        raise StageError(f"{type(self).__name__} decodes nothing in tiles")

    def preview(self, latents: Tensor) -> Tensor:
        """A picture [H, W, 3] uint8 of what a trajectory's `estimate` gave, at a fraction of what `decode` costs and as
        large as its result. Only where the spec `gives_previews`.
        """
        raise StageError(f"{type(self).__name__} gives no previews")

    def assemble(self, pieces: Sequence[Tensor], params: DiffusionParams) -> Tensor:
        """The finished output of one trajectory: a picture [H, W, 3] or a video [n, H, W, 3] uint8, audio
        [channels, n] float32.
        """
        return pieces[0]

    def meta(self, params: DiffusionParams) -> Mapping[str, Any]:
        """Plain JSON that goes into the payload's meta: {"sample_rate": 48000} for audio, {"fps": 24.0} for a video."""
        return {}


def check_limit(name: str, value: object, low: float, high: float, *, integer: bool = False) -> None:
    """InvalidRequestError unless value is a number within [low, high], `high` being one of the config's limits."""
    hint = " (limits.* of the config can raise this)"
    check_number(name, value, low, high, integer=integer, raises=InvalidRequestError, hint=hint)


def check_finite(values: Tensor, name: str) -> None:
    """StageError for NaN or infinity, which would otherwise become black pixels or silence. Waits for the device, so
    only for what is finished.
    """
    if not bool(torch.isfinite(values).all()):
        raise StageError(f"{name} are not finite; use dtype bfloat16 or float32, or a smaller guidance_scale")
