"""What a diffusion model adds to its contracts where several ranks can share its blocks. The first rank has the model
with its share of them; the others have nothing but theirs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from vllm_omni.layers.shard import ALONE, Shards
from vllm_omni.layers.weights import MakeCopies, allocate, load_weights, saved_bytes
from vllm_omni.utils.files import read_json
from vllm_omni.worker.diffusion.diffusion_model import DiffusionModel, DiffusionModelSpec, TokenBatch
from vllm_omni.worker.diffusion.published_part import vae_dtype


class SharedTokens(TokenBatch, Protocol):
    """A batch that can be sent to other ranks."""

    def content(self) -> tuple[Any, list[Tensor]]:
        """Plain values and tensors, of which `BlockStack.read_tokens` makes the same batch."""


class BlockStack(Protocol):
    """Blocks of which a rank has a share."""

    def run_blocks(self, tokens: Any, start: int, stop: int) -> SharedTokens:
        """As of a DiffusionModel: this rank's part of the work, with the ranks that have the others."""

    def read_tokens(self, plain: Any, tensors: Sequence[Tensor]) -> SharedTokens:
        """What the `content` of a batch was."""


class SharedModelSpec(DiffusionModelSpec):
    """The first of `weight_folders` holds the transformer, the one called `vae` an autoencoder."""

    parallel_axes: ClassVar[tuple[str, ...]]  # of a stage's `parallel`, along which it can be shared
    shared_parts: ClassVar[tuple[str, ...]]  # attributes of the transformer: its blocks

    @abstractmethod
    def shared_counts(self) -> Mapping[str, Mapping[str, int]]:
        """By axis, what ranks share along it, by name."""

    @abstractmethod
    def build_transformer(self, shards: Shards = ALONE) -> nn.Module:
        """On the meta device, with a share of its blocks: a BlockStack."""

    @abstractmethod
    def load(
        self,
        device: torch.device,
        dtype: torch.dtype,
        quantization: str | None = None,
        make_copies: MakeCopies | None = None,
        shards: Shards = ALONE,
    ) -> DiffusionModel:
        """As of a DiffusionModelSpec; a BlockStack, too. shards: the first rank's share."""

    def part_dtype(self, folder: Path, dtype: torch.dtype) -> torch.dtype:
        return vae_dtype(read_json(folder / "config.json"), dtype) if folder.name == "vae" else dtype

    def load_blocks(
        self, device: torch.device, dtype: torch.dtype, quantization: str | None, shards: Shards
    ) -> nn.Module:
        """Another rank's share, a BlockStack; nothing else of the checkpoint is read."""
        model = self.build_transformer(shards)
        for part in self.shared_parts:
            allocate(model.get_submodule(part), device, dtype, quantization)
        load_weights(model, self.weight_folders[0], variant=self.weights_variant, parts=self.shared_parts)
        return model

    def rank_bytes(self, dtype: torch.dtype, quantization: str | None, shards: Shards) -> int:
        """Bytes of all weights that the first rank holds."""
        whole, share = self.build_transformer(), self.build_transformer(shards)
        left_out = (_num_weights(whole) - _num_weights(share)) * dtype.itemsize
        saved = 0 if quantization is None else saved_bytes(share, dtype.itemsize, quantization)
        return self.weights_bytes(dtype) - left_out - saved


def _num_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
