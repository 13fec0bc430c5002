"""LoRA (arXiv 2106.09685) at work: what adapters add to the products of layers, each to the rows of its own requests.

Nothing is merged: a layer's weight stays as it is, packed or in int8, and whatever its adapters add is a product of low
rank beside it. So rows with different adapters, and without any, share a batch. Which rows of a product belong to which
row of the batch follows from their number: whoever packs rows says how (`packed`). Where that does not tell, the pass
ends with UnplacedRowsError, and may be run for the rows of each adapter by themselves, where nothing has to be told.

Legend: R rows of a batch, N rows of a product, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor, nn

from vllm_omni.errors import StageError
from vllm_omni.layers.packing import linear


@dataclass(frozen=True, slots=True)
class Up:
    """The second factor of some columns of a layer's output."""

    columns: slice
    ranks: slice  # of the first factor's
    matrix: Tensor  # [columns, ranks]; alpha / r is in it


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to a layer's output, in the layer's dtype: x @ down.T, and of that by each up."""

    down: Tensor  # [r, in], of all columns one below the other
    ups: tuple[Up, ...]


@dataclass(frozen=True, slots=True)
class Adapter:
    """One file's."""

    layers: Mapping[nn.Module, LowRank]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class AdapterMix:
    """The adapters of a request with their scales."""

    key: str  # equal for those that compute the same
    parts: tuple[tuple[Adapter, float], ...]

    def add(self, layer: nn.Module, x: Tensor, out: Tensor) -> None:
        """Adds to a layer's output, in place. x: [n, in], out: [n, out]."""
        for adapter, scale in self.parts:
            low = adapter.layers.get(layer)
            if low is not None:
                inner = linear(x, low.down)
                for up in low.ups:
                    out[:, up.columns].addmm_(inner[:, up.ranks], up.matrix.T, alpha=scale)


class UnplacedRowsError(StageError):
    """Which rows of a product belong to which row of the batch is not known."""


@dataclass(frozen=True, slots=True)
class AdaptedRows:
    """The adapters of a batch's rows, in the order in which they are packed."""

    mixes: tuple[AdapterMix | None, ...]
    # rows of a product -> how many belong to each row of the batch; None where two packings have as many
    lengths: Mapping[int, tuple[int, ...] | None] = field(default_factory=dict)

    def add(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """The output of a layer with what the adapters add, in its memory. x: [..., in], out: [..., out]."""
        if any(mix is not None and any(layer in adapter.layers for adapter, _ in mix.parts) for mix in self.mixes):
            flat, into = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
            for mix, rows in self._runs(len(flat)):
                mix.add(layer, flat[rows], into[rows])
        return out

    def packed(self, order: Sequence[int], lengths: Sequence[Sequence[int]]) -> AdaptedRows:
        """As of rows in another order, of which products have so many each."""
        found: dict[int, tuple[int, ...] | None] = {}
        for each in lengths:
            one, total = tuple(each), sum(each)
            found[total] = one if found.get(total, one) == one else None
        return AdaptedRows(tuple(self.mixes[row] for row in order), found)

    def _runs(self, num_rows: int) -> Iterator[tuple[AdapterMix, slice]]:
        """Neighbouring rows of a product that have the same adapters."""
        first = self.mixes[0]
        if first is not None and all(mix is not None and mix.key == first.key for mix in self.mixes):
            yield first, slice(0, num_rows)
            return
        lengths = self.lengths.get(num_rows)
        if lengths is None:
            raise UnplacedRowsError(f"a product of {num_rows} rows: which belong to which request is not known")
        start = stop = 0
        for index, (mix, length) in enumerate(zip(self.mixes, lengths, strict=True)):
            stop += length
            following = self.mixes[index + 1] if index + 1 < len(self.mixes) else None
            if mix is None or following is None or following.key != mix.key:
                if mix is not None:
                    yield mix, slice(start, stop)
                start = stop


_acting: ContextVar[AdaptedRows | None] = ContextVar("adapted rows", default=None)


def acting() -> AdaptedRows | None:
    """The adapters of the pass that this thread computes; None where it has none."""
    return _acting.get()


@contextmanager
def adapted(mixes: Sequence[AdapterMix | None]) -> Iterator[None]:
    """A pass over rows with these adapters."""
    with _set(AdaptedRows(tuple(mixes)) if any(mix is not None for mix in mixes) else None):
        yield


@contextmanager
def packed(order: Sequence[int], *lengths: Sequence[int]) -> Iterator[None]:
    """Within `adapted`: rows as a model packs them. order: packed row -> row of the pass. lengths: of every packing
    that products see here, how many rows of it each packed row has (where there is one for each, ones).
    """
    rows = acting()
    with _set(None if rows is None else rows.packed(order, lengths)):
        yield


@contextmanager
def _set(rows: AdaptedRows | None) -> Iterator[None]:
    token = _acting.set(rows)
    try:
        yield
    finally:
        _acting.reset(token)
