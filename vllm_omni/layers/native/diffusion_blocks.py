"""Blocks of a diffusion transformer run by one call of the kernels: attention and a feed-forward, each behind a norm
and maybe before another. What they compute is what the functions of `layers.modulation`, `layers.heads` and
`layers.banded` compute one by one.

Legend: N packed tokens of all rows, R rows, L tokens of a row, D width, d head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vllm_omni.layers.band import Band
from vllm_omni.layers.linear import Linear
from vllm_omni.layers.modulation import Norm, norm_struct_of
from vllm_omni.layers.native.decoder import struct_of
from vllm_omni.layers.native.full_attention import band_struct, fits
from vllm_omni.layers.native.library import Kernels, kernels_for, pointer, threads_for
from vllm_omni.layers.native.packed import NativePacking, can_gate
from vllm_omni.layers.native.structures import (
    DiffusionBlockStruct,
    HeadRowStruct,
    ModulationsStruct,
    NormStruct,
    TokenSpanStruct,
    TokensStruct,
)


class Rows(Protocol):
    """Neighbouring rows of equal length in the packed tensor; see `worker.diffusion.packing.Span`."""

    @property
    def rows(self) -> slice: ...
    @property
    def tokens(self) -> slice: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def rope(self) -> Tensor: ...
    @property
    def offset(self) -> int: ...


@dataclass(frozen=True, slots=True)
class BlockParts:
    """What one block computes with: the norms before and after attention, before and after the feed-forward.

    linears: queries, keys and values in one; the output of attention; gates and what they gate in one, or what GELU
    follows; and what leads back from there.
    """

    norms: tuple[Norm | None, Norm | None, Norm | None, Norm | None]
    head_row: HeadRowStruct
    linears: tuple[Linear, Linear, Linear, Linear]
    band: Band | None = None  # that attention sees, at the offset that a span says; None: everything

    def struct(self) -> DiffusionBlockStruct:
        """Pointers into the parts, which must outlive it."""
        norms = (NormStruct() if norm is None else norm_struct_of(norm) for norm in self.norms)
        return DiffusionBlockStruct(*norms, self.head_row, *map(struct_of, self.linears), band_struct(self.band))


class NativeBlocks:
    """Those of one stack, whose weights are packed and stay where they are."""

    def __init__(self, blocks: Sequence[BlockParts]) -> None:
        self._blocks = (DiffusionBlockStruct * len(blocks))(*(block.struct() for block in blocks))
        self._dtype = blocks[0].linears[0].input_dtype
        self._weights = sum(linear.weight.numel() for linear in blocks[0].linears)  # of one block

    @classmethod
    def find(cls, blocks: Sequence[BlockParts]) -> NativeBlocks | None:
        """None where the kernels do not take such blocks, or their weights are packed in another way."""
        if not blocks or not all(isinstance(x.packing, NativePacking) for block in blocks for x in block.linears):
            return None
        row, (_, _, up, _) = blocks[0].head_row, blocks[0].linears
        is_fit = fits(row.queries, row.keys, row.size) and (up.activation == "gelu" or can_gate(up.out_features))
        return cls(blocks) if is_fit else None

    def functions(self, hidden: Tensor, condition: Tensor | None) -> Kernels | None:
        """None where the kernels are not to compute such states, or what comes of such a condition."""
        is_fit = hidden.dtype == self._dtype and (condition is None or condition.dtype == self._dtype)
        return kernels_for(hidden, condition) if is_fit else None

    def run(
        self,
        functions: Kernels,
        first: int,
        last: int,
        hidden: Tensor,
        spans: Sequence[Rows],
        modulations: Tensor | None,
    ) -> Tensor:
        """The blocks [first, last) from hidden states [N, D] -> [N, D]. modulations: [last - first, R, 4, D]: scale and
        gate of attention, scale and gate of the feed-forward; or [..., 6, D], before each two a shift; None: nothing.
        """
        num_rows, count = spans[-1].rows.stop, 4 if modulations is None else modulations.shape[2]
        assert hidden.dtype == self._dtype and (modulations is None or modulations.dtype == self._dtype)
        assert modulations is None or modulations.shape == (last - first, num_rows, count, hidden.shape[1])
        assert count in (4, 6)
        if first >= last:
            return hidden
        hidden = hidden.clone(memory_format=torch.contiguous_format)
        ropes = [span.rope.contiguous() for span in spans]
        structs = (TokenSpanStruct * len(spans))(
            *(_span_struct(span, hidden, rope) for span, rope in zip(spans, ropes, strict=True))
        )
        functions.run_blocks(
            ctypes.byref(self._blocks, first * ctypes.sizeof(DiffusionBlockStruct)),
            last - first,
            structs,
            len(spans),
            ModulationsStruct(pointer(modulations), num_rows, count),
            hidden.data_ptr(),
            threads_for(len(hidden) * self._weights),
        )
        return hidden


def _span_struct(span: Rows, hidden: Tensor, rope: Tensor) -> TokenSpanStruct:
    tokens = TokensStruct(span.num_rows, span.length, hidden.shape[1])
    return TokenSpanStruct(span.rows.start, span.tokens.start, tokens, pointer(rope), span.offset)
