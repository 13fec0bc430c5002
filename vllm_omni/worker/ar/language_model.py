"""What every language model of an AR stage is and is given: its protocols, the folder that it stands in, and how it is
loaded.

Knows no batch and no request. Legend: N tokens of a step, D hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from vllm_omni import registry
from vllm_omni.errors import ConfigError
from vllm_omni.layers import halves
from vllm_omni.layers.blocks import StreamedBytes
from vllm_omni.layers.forward_context import ForwardContext
from vllm_omni.layers.meta_device import on_meta_device
from vllm_omni.layers.published_quantization import read_quantization
from vllm_omni.layers.shard import WHOLE, Shard
from vllm_omni.layers.weights import (
    MakeCopies,
    allocate,
    choose_numbers,
    load_weights,
    saved_bytes,
    tensor_files,
    tensor_shapes,
    weights_bytes,
)
from vllm_omni.utils.checkpoint_files import reading
from vllm_omni.utils.files import read_json
from vllm_omni.utils.variants import check_variant, variants_in
from vllm_omni.worker.ar.media_prompt import MediaItem
from vllm_omni.worker.ar.prompt_reader import PromptReader
from vllm_omni.worker.architecture import language_architecture
from vllm_omni.worker.published_dtype import dtype_of_config, dtype_of_headers, dtypes_of_matrices

DECODER = "decoder"  # the attribute of a model that holds its layers


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
    def shared_counts(self) -> dict[str, int]:
        """What ranks share that compute its decoder together, by name."""

    @property
    def num_positions(self) -> int:
        """The most tokens of a sequence."""

    @property
    def window(self) -> int | None:
        """How many tokens up to its own any token sees in any layer; None where a layer sees all of them."""

    @property
    def windows(self) -> tuple[int | None, ...]:
        """By layer, how many tokens up to its own any token sees; None: all. Empty where no layer has a window."""

    @property
    def scaled_beyond(self) -> int | None:
        """The length of a sequence from which on the keys and values of its tokens depend on that length, so that no
        other may share them; None where they never do.
        """

    @property
    def can_write(self) -> bool:
        """Whether there is a head that gives logits."""

    def with_rope_scaling(self, scaling: Mapping[str, Any]) -> LanguageModelConfig:
        """The same with other rotary positions, in the keys of transformers' `rope_scaling`; ConfigError for what makes
        none.
        """


class LanguageModel(Protocol):
    """A decoder-only model over a paged KV cache, loadable by `layers.weights`."""

    prompt_reader: ClassVar[type[PromptReader[Any]] | None]  # None for a model that reads text alone
    text_only: ClassVar[type | None]  # the same model without what reads media; None where there is none
    other_parts: ClassVar[tuple[str, ...]]  # how published names begin that belong to other models of the folder
    # Whether a step of single tokens that are ids alone, or joined by rows where it `joins_rows`, computes by the
    # shapes of its tensors, whatever stands in them, so that it may be captured in a graph.
    is_capturable: ClassVar[bool]
    joins_rows: ClassVar[bool]  # whether a row [D] joins each token that it has written
    can_shard: ClassVar[bool]  # whether several ranks may share its decoder
    config: LanguageModelConfig

    def __call__(self, token_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """token_ids: [N], positions: [N] or, where sequences have positions of three axes, [3, N], int64 -> the last
        states that were computed, [N, D], or [R, D] of the R rows that the context wants.
        """

    def compute_logits(self, states: Tensor) -> Tensor:
        """states: [R, D] after the final norm -> [R, V]."""


class MediaReader(Protocol):
    """A language model that reads media, too, as its prompt reader gives them."""

    def encode(self, item: MediaItem) -> Tensor:
        """One image, audio or video -> the rows [M, D] that stand for its placeholder tokens."""


class ComputedBuffers(ABC):
    """A module with buffers that no checkpoint holds."""

    @abstractmethod
    def fill_buffers(self) -> None:
        """Computes them; called when the module has its memory."""


@dataclass(frozen=True, slots=True)
class LanguageModelFolder:
    """A checkpoint whose config.json has been read: which model it holds, and how that is loaded."""

    folder: Path
    part: str | None  # which model of a checkpoint that holds several
    name: str  # its row in the registry: "architecture" or "architecture.part"
    model_class: Any
    config: LanguageModelConfig
    rope_scaling: Mapping[str, Any] | None = None  # what stands in the place of the file's own
    stated_dtype: torch.dtype | None = None  # what the file says that the weights were published in
    weights_variant: str | None = None  # which weight files are loaded
    published_quantization: str | None = None  # "int8" or "float8", where the file says that they were quantised

    @classmethod
    def open(
        cls,
        folder: Path,
        part: str | None = None,
        rope_scaling: Mapping[str, Any] | None = None,
        weights_variant: str | None = None,
        reads_media: bool | None = None,
    ) -> LanguageModelFolder:
        """ConfigError for anything that the model class does not support, and for weights that are not there in the
        variant; CheckpointError for a missing file. rope_scaling: in the place of the file's own. reads_media: None for
        what the folder holds the weights and settings for.
        """
        if weights_variant is not None:
            check_variant(weights_variant, {folder.name: variants_in(folder)}, folder)
        where = folder / "config.json"
        raw = read_json(where)
        name = registered_name(raw, str(where), part, folder)
        raw["architectures"] = [name.partition(".")[0]]
        found = _model_class(name, folder, weights_variant, reads_media)
        with reading(str(where)):
            config: LanguageModelConfig = found.read_config(raw, str(where))
            if rope_scaling is not None:
                config = config.with_rope_scaling(rope_scaling)
        stated, quantized = dtype_of_config(raw, part), read_quantization(raw, str(where))
        return cls(folder, part, name, found, config, rope_scaling, stated, weights_variant, quantized)

    @property
    def key(self) -> tuple[str, ...]:
        """What makes the models of two stages the same one."""
        return (
            self.model_class.__name__,
            str(self.folder.resolve()),
            self.part or "",
            "" if self.rope_scaling is None else repr(sorted(self.rope_scaling.items())),
            self.weights_variant or "",
        )

    def weights_bytes(self, itemsize: int, quantization: str | None = None, shard: Shard = WHOLE) -> int:
        """Of the parameters that the first rank holds, itemsize bytes each but for what is quantised."""
        if not shard.is_whole:
            model = self.build(shard)
            total = sum(parameter.numel() for parameter in model.parameters()) * itemsize
            return total if quantization is None else total - saved_bytes(model, itemsize, quantization)
        left_out, variant = self.model_class.other_parts, self.weights_variant
        total = weights_bytes(self.folder, itemsize, self._tensor_prefix, left_out, variant)
        return total if quantization is None else total - saved_bytes(self.build(), itemsize, quantization)

    def streamed_bytes(self, dtype: torch.dtype, quantization: str | None = None) -> StreamedBytes:
        """Of its layers, where they are streamed."""
        model = self.build()
        choose_numbers(model, dtype, quantization)
        return StreamedBytes.of(model)

    def published_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the part's tensors."""
        return tensor_shapes(self.folder, self._tensor_prefix, self.weights_variant)

    def published_dtype(self) -> torch.dtype | None:
        """What the file says of the plain weights, else what most of the parameters are stored in; None where neither
        tells.
        """
        if self.stated_dtype is not None and self.weights_variant is None:
            return self.stated_dtype
        files = tensor_files(self.folder, self._tensor_prefix, self.weights_variant).values()
        return dtype_of_headers(files, self._tensor_prefix, self.model_class.other_parts)

    def keeps_halves(self) -> bool:
        """Whether all matrices of the part are stored in bfloat16, and are multiplied so beside float32."""
        files = tensor_files(self.folder, self._tensor_prefix, self.weights_variant).values()
        found = dtypes_of_matrices(files, self._tensor_prefix, self.model_class.other_parts)
        return halves.is_fast() and found == {torch.bfloat16}

    def load(
        self,
        device: torch.device,
        dtype: torch.dtype,
        quantization: str | None = None,
        make_copies: MakeCopies | None = None,
        shard: Shard = WHOLE,
    ) -> LanguageModel:
        """The model, built without initialising and filled from its safetensors files; of its decoder a share.
        make_copies: what brings the weights of its layers to the device, where they wait elsewhere.
        """
        model = self.build(shard)
        allocate(model, device, dtype, quantization, make_copies)
        load_weights(model, self.folder, self._tensor_prefix, self.weights_variant)
        _fill_buffers(model)
        return model  # type: ignore[return-value]

    def load_decoder(
        self, device: torch.device, dtype: torch.dtype, quantization: str | None, shard: Shard
    ) -> nn.Module:
        """A share of the decoder alone; nothing else of the checkpoint is read."""
        model = self.build(shard)
        decoder = model.get_submodule(DECODER)
        allocate(decoder, device, dtype, quantization)
        load_weights(model, self.folder, self._tensor_prefix, self.weights_variant, parts=(DECODER,))
        _fill_buffers(decoder)
        return decoder

    def build(self, shard: Shard = WHOLE) -> nn.Module:
        """On the meta device. shard: of a model class that `can_shard`."""
        with on_meta_device():
            model: nn.Module = (
                self.model_class(self.config) if shard.is_whole else self.model_class(self.config, shard=shard)
            )
        return model

    @property
    def _tensor_prefix(self) -> str:
        """How the published names of the part's tensors begin."""
        return f"{self.part}." if self.part else ""


def _fill_buffers(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, ComputedBuffers):
            module.fill_buffers()


def _model_class(name: str, folder: Path, variant: str | None, reads_media: bool | None) -> Any:
    """The registered class, or the one for text alone where no media are to be read, or could be."""
    found = registry.resolve("language model", name)
    if found.text_only is None:
        can_read = found.prompt_reader is not None
        if reads_media not in (None, can_read):
            raise ConfigError(f"reads_media: got {reads_media}, but {name} reads {_read(can_read)}; remove the key")
        return found
    if reads_media is False:
        return found.text_only
    lacking = _lacking(found, folder, variant)
    if lacking is not None and reads_media:
        raise ConfigError(f"reads_media: got True, but {folder} has {lacking}; complete the folder, or remove the key")
    return found if lacking is None else found.text_only


def _read(can_read: bool) -> str:
    return "media in any case" if can_read else "text alone"


def _lacking(found: Any, folder: Path, variant: str | None) -> str | None:
    """What of a checkpoint is not there that reading media needs."""
    if not found.prompt_reader.has_settings(folder):
        return "no settings of its processors (preprocessor_config.json), also not in `processor` beside it"
    encoders = found.text_only.other_parts
    if not any(name.startswith(encoders) for name in tensor_files(folder, variant=variant)):
        return f"no weights whose names begin with {' or '.join(encoders)}"
    return None


def model_class(raw_config: Mapping[str, Any], where: str, part: str | None = None) -> Any:
    """The registered class for a config.json and, where several models share it, for the part."""
    return registry.resolve("language model", registered_name(raw_config, where, part))


def registered_name(
    raw_config: Mapping[str, Any], where: str, part: str | None = None, folder: Path | None = None
) -> str:
    """`architecture` or `architecture.part`, a row of the registry; ConfigError where there is none. folder: see
    `language_architecture`.
    """
    name = language_architecture(raw_config, where, folder)
    parts = [row.partition(".")[2] for row in registry.names("language model") if row.startswith(f"{name}.")]
    if part not in parts if parts else part is not None:
        raise ConfigError(
            f"{where}: got part {part!r} of {name}, expected "
            + (f"one of {', '.join(parts)}; set the stage's `part`" if parts else "none; it is one model")
        )
    return f"{name}.{part}" if part else name
