"""What every language model of an AR stage is and is given: its protocols, the context of one forward pass, and how it
is loaded.

Knows no batch and no request. Legend: N tokens of a step, D hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vllm_omni import registry
from vllm_omni.errors import ConfigError
from vllm_omni.layers.attention import PagedAttention
from vllm_omni.models.loader import load_weights
from vllm_omni.models.media import MediaItem
from vllm_omni.models.sequence_inputs import InputRows
from vllm_omni.utils.files import read_json


class LanguageModelConfig(Protocol):
    """What an engine must know of a model before it is loaded."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def can_write(self) -> bool:
        """Whether there is a head that gives logits."""


class HiddenStateTaps:
    """Side storage of tapped hidden states, kept per slot of the KV pool, so that whatever serves a prefix serves its
    states too.

    layers: indices into transformers' `hidden_states` (0 the embeddings, i the state after layer i, the last one after
    the final norm).
    """

    def __init__(
        self, layers: Sequence[int], num_slots: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._columns = {layer: column for column, layer in enumerate(sorted(set(layers)))}
        self._states = torch.empty(len(self._columns), num_slots, hidden_size, dtype=dtype, device=device)

    def write(self, layer: int, states: Tensor, slots: Tensor) -> None:
        """states: [>= N, D] of one layer, slots: [N]; layers that are not tapped are passed over."""
        if layer in self._columns:
            self._states[self._columns[layer]].index_copy_(0, slots, states[: len(slots)])

    def read(self, layers: Sequence[int], slots: Tensor) -> Tensor:
        """slots: [T] -> a new tensor [T, len(layers) * D], the layers side by side."""
        return torch.cat([self._states[self._columns[layer]].index_select(0, slots) for layer in layers], dim=-1)

    @property
    def num_bytes(self) -> int:
        return self._states.numel() * self._states.element_size()


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """What a forward pass needs besides tokens and positions.

    kv_cache: [num_layers, 2, blocks, block_size, kv heads, head size]. num_layers: how many layers run; when all do,
    the final norm follows. input_rows: what joins or replaces embeddings, for models that are fed such.
    """

    attention: PagedAttention
    kv_cache: Tensor
    num_layers: int
    taps: HiddenStateTaps | None = None
    input_rows: InputRows | None = None

    def tap(self, layer: int, states: Tensor) -> None:
        """Offers the states of one index of `hidden_states`, [N, D]."""
        if self.taps is not None:
            self.taps.write(layer, states, self.attention.metadata.slot_mapping)


class LanguageModel(Protocol):
    """A decoder-only model over a paged KV cache, loadable by `models.loader`."""

    config: LanguageModelConfig

    def __call__(self, token_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """token_ids: [N], positions: [N] or, where sequences have positions of three axes, [3, N], int64 -> the last
        states that were computed, [N, D].
        """

    def compute_logits(self, states: Tensor) -> Tensor:
        """states: [R, D] after the final norm -> [R, V]."""


class MediaReader(Protocol):
    """A language model that reads media, too."""

    def encode(self, item: MediaItem) -> Tensor:
        """One image, audio or video -> the rows [M, D] that stand for its placeholder tokens."""


class ComputedBuffers(ABC):
    """A module with buffers that no checkpoint holds."""

    @abstractmethod
    def fill_buffers(self) -> None:
        """Computes them; called when the module has its memory."""


def model_class(raw_config: Mapping[str, Any], where: str, part: str | None = None) -> Any:
    """The registered class for the `architectures` of a config.json, and for the part where several models share it."""
    architectures = raw_config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ConfigError(f"{where}: architectures: got {architectures!r}, expected a list of one name")
    name = str(architectures[0])
    parts = [row.partition(".")[2] for row in registry.names("language model") if row.startswith(f"{name}.")]
    if part not in parts if parts else part is not None:
        raise ConfigError(
            f"{where}: got part {part!r} of {name}, expected "
            + (f"one of {', '.join(parts)}; set the stage's `part`" if parts else "none; it is one model")
        )
    return registry.resolve("language model", f"{name}.{part}" if part else name)


def read_model_config(folder: Path, part: str | None = None) -> LanguageModelConfig:
    """The parsed config.json of a language model folder; ConfigError for anything that the model class does not
    support.
    """
    where = folder / "config.json"
    raw = read_json(where)
    config: LanguageModelConfig = model_class(raw, str(where), part).read_config(raw, str(where))
    return config


def tensor_prefix(part: str | None) -> str:
    """How the published names of a part's tensors begin."""
    return f"{part}." if part else ""


def model_key(
    folder: Path, device: torch.device, dtype: torch.dtype, part: str | None = None
) -> tuple[str, str, str, str]:
    """What makes two loaded models the same: their key in a ModelPool."""
    name = model_class(read_json(folder / "config.json"), str(folder), part).__name__
    return name, str(folder.resolve()), str(device), str(dtype)


def load_language_model(
    folder: Path, device: torch.device, dtype: torch.dtype, part: str | None = None
) -> LanguageModel:
    """The model of a folder, built without initialising and filled from its safetensors files."""
    where = folder / "config.json"
    raw = read_json(where)
    build = model_class(raw, str(where), part)
    with torch.device("meta"):
        model: nn.Module = build(build.read_config(raw, str(where)))
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    load_weights(model, folder, tensor_prefix(part))
    for module in model.modules():
        if isinstance(module, ComputedBuffers):
            module.fill_buffers()
    return model  # type: ignore[return-value]
