"""What every language model of an AR stage is and is given: its protocols, the context of one forward pass, and how it
is loaded.

Knows no batch and no request. Legend: N tokens of a step, D hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vllm_omni import registry
from vllm_omni.errors import ConfigError
from vllm_omni.layers.forward_context import ForwardContext
from vllm_omni.layers.weights import load_weights
from vllm_omni.utils.files import read_json
from vllm_omni.worker.ar.media_prompt import MediaItem


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
