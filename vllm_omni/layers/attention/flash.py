"""Paged attention by FlashAttention-2, on CUDA: the package flash-attn where it is installed, else torch's own copy.

Keys are never split (`num_splits=1`): torch's copy leaves rows unwritten when it splits the keys of a paged cache, and
how it splits would depend on the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from vllm_omni.layers.attention.base import AttentionMetadata, AttentionUse, PagedAttention
from vllm_omni.utils.device import compute_capability, is_cuda

PAGE = 256  # the kernels read blocks of whole multiples
MAX_HEAD_DIM = 256
DTYPES = (torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)  # Ampere


@dataclass(frozen=True, slots=True)
class FlashPart:
    """Sequences of a step as the kernels take them: everything int32."""

    rows: Tensor | slice  # of the step's tokens
    query_starts: Tensor  # [B + 1]
    key_starts: Tensor  # [B + 1], as if the keys stood one behind the other
    lengths: Tensor  # [B]
    block_table: Tensor  # [B, blocks]
    longest_query: int
    longest_context: int  # what the table has room for: it stays the same from step to step

    @classmethod
    def of(cls, metadata: AttentionMetadata, members: Sequence[int] | None = None) -> FlashPart:
        """members: sequences of the step; None: all."""
        starts = metadata.query_starts
        device = metadata.block_table.device
        lengths, table = metadata.context_lens_tensor, metadata.block_table
        rows: Tensor | slice = slice(None)
        query_starts = metadata.query_starts_tensor
        tokens = [stop - start for start, stop in pairwise(starts)]
        if members is not None:
            picked = torch.tensor(members, device=device)
            lengths, table = lengths[picked], table[picked]
            rows = torch.tensor([row for index in members for row in range(*starts[index : index + 2])], device=device)
            tokens = [tokens[index] for index in members]
            query_starts = _starts(torch.tensor(tokens, device=device))
        return cls(
            rows=rows,
            query_starts=query_starts.int(),
            key_starts=_starts(lengths),
            lengths=lengths.int(),
            block_table=table.int(),
            longest_query=max(tokens),
            longest_context=table.shape[1] * metadata.block_size,
        )


class FlashKernel(Protocol):
    """What attends."""

    takes_mixed: bool  # single tokens and chunks in one call

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, part: FlashPart, window: int | None) -> Tensor:
        """query: [n, H, D] of the part; keys, values: [blocks, block_size, K, D] -> [n, H, D]."""


class TorchKernel:
    """`torch.nn.attention.varlen.varlen_attn`, as of torch 2.12."""

    takes_mixed = True

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, part: FlashPart, window: int | None) -> Tensor:
        attended: Tensor = self._function(
            query,
            keys,
            values,
            part.query_starts,
            part.key_starts,
            part.longest_query,
            part.longest_context,
            window_size=_sides(window),
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=part.lengths,
            block_table=part.block_table,
            num_splits=1,
        )
        return attended


class PackageKernel:
    """`flash_attn_with_kvcache` for single tokens, since it can be told not to split, and `flash_attn_varlen_func` for
    chunks.
    """

    takes_mixed = False

    def __init__(self, with_kvcache: Callable[..., Tensor], varlen: Callable[..., Tensor]) -> None:
        self._with_kvcache = with_kvcache
        self._varlen = varlen

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, part: FlashPart, window: int | None) -> Tensor:
        if part.longest_query == 1:
            return self._with_kvcache(
                query[:, None],
                keys,
                values,
                cache_seqlens=part.lengths,
                block_table=part.block_table,
                causal=True,
                window_size=_sides(window),
                num_splits=1,
            )[:, 0]
        return self._varlen(
            query,
            keys,
            values,
            part.query_starts,
            part.key_starts,
            part.longest_query,
            part.longest_context,
            causal=True,
            window_size=_sides(window),
            block_table=part.block_table,
        )


@cache
def installed_kernel() -> FlashKernel | None:
    """The package's, else torch's; None where neither reads paged caches."""
    try:
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        is_paged = "block_table" in inspect.signature(varlen_attn).parameters
        return TorchKernel(varlen_attn) if is_paged else None
    return PackageKernel(flash_attn_with_kvcache, flash_attn_varlen_func)


class FlashAttention(PagedAttention):
    """One call for all sequences of a step, or one for its single tokens and one for its chunks."""

    is_capturable = True
    find_kernel: ClassVar[Callable[[], FlashKernel | None]] = staticmethod(installed_kernel)

    @classmethod
    def complaint(cls, use: AttentionUse) -> str | None:
        if not is_cuda(use.device):
            return f"got device {use.device.type}, expected cuda"
        if compute_capability(use.device) < LEAST_CAPABILITY:
            return "got a GPU older than Ampere, expected compute capability 8.0 or later"
        if use.dtype not in DTYPES:
            return f"got dtype {str(use.dtype).removeprefix('torch.')}, expected bfloat16 or float16"
        if use.block_size % PAGE:
            return f"got block_size {use.block_size}, expected a multiple of {PAGE}"
        if use.head_dim > MAX_HEAD_DIM or use.head_dim % 8:
            return f"got heads of {use.head_dim}, expected a multiple of 8 up to {MAX_HEAD_DIM}"
        if cls.find_kernel() is None:
            return f"got torch {torch.__version__}, expected 2.12 or later, or the package flash-attn"
        return None

    def __init__(self, metadata: AttentionMetadata) -> None:
        super().__init__(metadata)
        kernel = type(self).find_kernel()
        assert kernel is not None, "a backend that a complaint was raised against"
        self._kernel = kernel
        metadata = self.metadata
        is_single = [stop - start == 1 for start, stop in pairwise(metadata.query_starts)]
        if kernel.takes_mixed or all(is_single) or not any(is_single):
            self._parts = [FlashPart.of(metadata)]
        else:
            kinds = ([index for index, single in enumerate(is_single) if single is kind] for kind in (True, False))
            self._parts = [FlashPart.of(metadata, members) for members in kinds]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, window: int | None) -> Tensor:
        keys, values = kv_cache
        if len(self._parts) == 1:
            return self._kernel(query, keys, values, self._parts[0], window)
        output = torch.empty_like(query)
        for part in self._parts:
            output[part.rows] = self._kernel(query[part.rows], keys, values, part, window)
        return output


def _sides(window: int | None) -> tuple[int, int]:
    """How many keys each token sees before its own and after it; -1: all."""
    return (-1 if window is None else window - 1, 0)


def _starts(counts: Tensor) -> Tensor:
    """[B] -> [B + 1] int32 offsets."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
