"""What crosses from one stage to the next, and the description of it that is checked at load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor by name of its dimensions: an int is fixed, a str varies ("T" tokens, "L" layers); `dims=("T", 192)`."""

    dims: tuple[int | str, ...]

    def fits(self, other: object) -> bool:
        """Whether the other is a tensor too and every pair of fixed dimensions agrees."""
        if not isinstance(other, TensorSpec) or len(self.dims) != len(other.dims):
            return False
        pairs = zip(self.dims, other.dims, strict=True)
        return all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))

    @property
    def row_shape(self) -> tuple[int, ...]:
        """[...] of one row: without the first dimension, those that vary being 0."""
        return tuple(size if isinstance(size, int) else 0 for size in self.dims[1:])

    def __str__(self) -> str:
        return "[" + ", ".join(map(str, self.dims)) + "]"


@dataclass(frozen=True, slots=True)
class TextSpec:
    """Words that a stage writes or reads."""

    def fits(self, other: object) -> bool:
        return isinstance(other, TextSpec)

    def __str__(self) -> str:
        return "text"


@dataclass(frozen=True, slots=True)
class DataSpec:
    """A JSON object that writer and reader know by this name, such as "music"."""

    name: str

    def fits(self, other: object) -> bool:
        return isinstance(other, DataSpec) and other.name == self.name

    def __str__(self) -> str:
        return f"data {self.name!r}"


PortSpec = TensorSpec | TextSpec | DataSpec


@dataclass(frozen=True, slots=True)
class StageSignature:
    """The ports of a stage, known from its configuration alone: what it reads and what it can give."""

    inputs: Mapping[str, PortSpec] = field(default_factory=dict)
    outputs: Mapping[str, PortSpec] = field(default_factory=dict)
    required_inputs: frozenset[str] = frozenset()
    results: frozenset[str] = frozenset()  # the outputs that a bare stage name in a config's `outputs` asks for
    meta: frozenset[str] | None = None  # keys of the payload's meta besides its ports, for conditions; None: not known
    # their value is always StreamChunks, a whole payload being one; a writer that made no row gives one empty chunk
    streamed_inputs: frozenset[str] = frozenset()
    streamed_outputs: frozenset[str] = frozenset()  # they can be given row by row while the stage works
    # over which the text of a request comes that is not complete yet, in rows that the stage makes of it (`open_text`);
    # no stage feeds them, and their value is StreamChunks
    text_inputs: Mapping[str, PortSpec] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RowRange:
    """Which rows of a port (its first dimension) make up one chunk: [start, stop) are new in exactly one chunk."""

    start: int
    stop: int
    num_before: int = 0  # rows before them that are brought along as context
    num_after: int = 0  # rows behind them that are brought along as context
    is_last: bool = False  # no chunk follows; then it may have no new row
    keep_from: int = 0  # the first row that a later chunk may bring along again


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """Consecutive rows of a port (its first dimension), each new in exactly one chunk."""

    rows: Tensor  # [num_before + n + num_after, ...]: n >= 0 new ones between the context that is brought along
    start: int = 0  # the index in the whole port of the first new row
    num_before: int = 0
    num_after: int = 0
    is_last: bool = False  # no chunk follows; then n may be 0

    @property
    def new_rows(self) -> Tensor:
        """[n, ...]: without context."""
        return self.rows[self.num_before : len(self.rows) - self.num_after]

    @property
    def stop(self) -> int:
        """The index in the whole port behind the last new row."""
        return self.start + len(self.rows) - self.num_before - self.num_after


@dataclass(frozen=True, slots=True)
class SavedStage:
    """A stage's task on its way, enough for the same stage to go on with it in another process."""

    fingerprint: Mapping[str, Any]  # of `StageSpec.fingerprint`
    content: Mapping[str, Any]  # of `StageEngine.save_state`; of a file not checked yet


@dataclass(frozen=True, slots=True)
class StagePayload:
    """What a stage made of one request; its tensors pass by reference in one process, so nobody may write into them."""

    request_id: str
    source: str
    tensors: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # the outputs that somebody reads, on the stage's device
    meta: Mapping[str, Any] = field(default_factory=dict)  # plain JSON; a port of text or data stands under its name

    def port(self, name: str) -> Any:
        """The value of one port: a tensor, text or data."""
        return self.tensors[name] if name in self.tensors else self.meta[name]

    @property
    def is_lost(self) -> bool:
        """Whether the process is gone that held the content of a tensor."""
        from vllm_omni.utils.device_memory import FarTensor  # which needs torch

        return any(isinstance(tensor, FarTensor) and tensor.is_gone() for tensor in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
