"""The contract of a diffusion model as a stage runs it: geometry, text, guidance, blocks, pixels. One implementation
per published pipeline.

Knows no requests, no batching policy and no cache; holds weights only. Every tensor argument and result is on the
model's device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from vllm_omni.params import DiffusionParams
from vllm_omni.payload import PortSpec


class Sampler(Protocol):
    """A diffusers scheduler with its own state, one per output of a request."""

    timesteps: Tensor

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool) -> tuple[Tensor, ...]:
        """[1, C, h, w] at this timestep -> the sample at the next one."""


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
        """Packed row -> the row that `begin` was given."""


class DiffusionModel(ABC):
    """default_steps and default_guidance are the published pipeline's own fallbacks."""

    default_steps: ClassVar[int]
    default_guidance: ClassVar[float]
    num_blocks: int

    @classmethod
    @abstractmethod
    def ports(cls, folder: Path) -> Mapping[str, PortSpec]:
        """Input ports of the stage; `prompt_embeds` is required, `negative_prompt_embeds` is read when guidance
        acts.
        """

    @classmethod
    @abstractmethod
    def guides(cls, guidance_scale: float) -> bool:
        """Whether this guidance scale makes the negative branch matter."""

    @classmethod
    @abstractmethod
    def weights_bytes(cls, folder: Path, dtype: torch.dtype) -> int:
        """Bytes of all weights, from the safetensors headers."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> DiffusionModel:
        """Reads the checkpoint."""

    @abstractmethod
    def check(self, params: DiffusionParams) -> None:
        """Raises InvalidRequestError for sizes and options that the model cannot run."""

    @abstractmethod
    def size(self, params: DiffusionParams) -> tuple[int, int]:
        """(height, width) in pixels, the model's own where the request names none."""

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """[C, h, w] of the latents of a picture."""

    @abstractmethod
    def num_tokens(self, height: int, width: int, text_length: int) -> int:
        """Tokens of one row."""

    @abstractmethod
    def sampler(self, params: DiffusionParams, num_steps: int, latent_shape: tuple[int, int, int]) -> Sampler:
        """A fresh sampler, its timesteps set."""

    @abstractmethod
    def encode_text(self, prompt_embeds: Tensor) -> Tensor:
        """[t, D] states of one prompt -> what `begin` takes for each of its rows."""

    @abstractmethod
    def begin(self, latents: Sequence[Tensor], timesteps: Sequence[float], texts: Sequence[Tensor]) -> TokenBatch:
        """Embeds rows: float32 latents [C, h, w] and sampler timesteps (1000 is pure noise)."""

    @abstractmethod
    def run_blocks(self, tokens: Any, start: int, stop: int) -> TokenBatch:
        """Blocks start .. stop - 1."""

    @abstractmethod
    def finish(self, tokens: Any) -> list[Tensor]:
        """What the sampler takes as model output, float32 [C, h, w], in `begin`'s order of rows."""

    @abstractmethod
    def guided_now(self, params: DiffusionParams, guidance_scale: float, timestep: float) -> bool:
        """Whether the negative branch acts at this timestep."""

    @abstractmethod
    def guide(self, positive: Tensor, negative: Tensor, guidance_scale: float, params: DiffusionParams) -> Tensor:
        """Both branches' outputs, [C, h, w] each -> the guided one."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """[C, h, w] -> [H, W, 3] uint8."""
