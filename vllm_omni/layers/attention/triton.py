"""Paged attention by kernels of our own, which read the pool in place: any block size, grouped heads, windows. On CUDA,
and for tests on a CPU in Triton's interpreter.

A single-token query is split over its keys and combined (flash-decoding); how many splits there are depends on its own
length. A launch depends on the shapes of buffers alone, the lengths are read on the device: a decode step can be
captured in a graph.
"""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vllm_omni.layers.attention.base import AttentionMetadata, AttentionUse, PagedAttention
from vllm_omni.layers.triton.library import missing_to_compile, power_of_two
from vllm_omni.utils.device import current_device, is_cuda

MIN_SPLIT = 128  # keys
MAX_SPLITS = 16
SPLITS = {"MIN_SPLIT": MIN_SPLIT, "MAX_SPLITS": MAX_SPLITS}
OF_RESULT = ("NUM_HEADS", "HEAD_DIM", "WINDOW", "BLOCK_N", "BLOCK_D")
MAX_HEAD_DIM = 256
LEAST_ROWS = 16  # of a product
TILE_BYTES = 32768  # of the queries of a program over prompt tokens, at most
TILE_ROWS = 64  # the most of them: tokens times heads of a group
BLOCK_BYTES = 16384  # of a block of keys; several blocks and the queries must fit the shared memory of any GPU
INTERPRETER = "TRITON_INTERPRET"  # Triton's own switch


class TritonAttention(PagedAttention):
    """Single tokens in one launch over all sequences and a second one that combines; prompt chunks in one of tiles."""

    is_capturable = True

    @classmethod
    def complaint(cls, use: AttentionUse) -> str | None:
        if find_spec("triton") is None:
            return "needs the package triton; install it"
        if is_cuda(use.device):
            missing = missing_to_compile()
            if missing is not None:
                return f"needs {missing}, with which triton makes its launchers; install it"
        elif os.environ.get(INTERPRETER) != "1":
            return f"got device {use.device.type}, expected cuda"
        elif use.dtype == torch.bfloat16:
            return "got dtype bfloat16, which Triton's interpreter cannot multiply, expected float32 or float16"
        if use.head_dim > MAX_HEAD_DIM:
            return f"got heads of {use.head_dim}, expected at most {MAX_HEAD_DIM}"
        return None

    def __init__(self, metadata: AttentionMetadata) -> None:
        super().__init__(metadata)
        lengths = [stop - start for start, stop in pairwise(self.metadata.query_starts)]
        self._has_single = 1 in lengths
        self._chunks = [(index, length) for index, length in enumerate(lengths) if length > 1]
        self._tiles: dict[int, Tensor] = {}  # by their tokens, planned when the first layer asks

    def attend(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, window: int | None) -> Tensor:
        query = query if query.stride()[1:] == (query.shape[2], 1) else query.contiguous()
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        shape = KernelShape(query, kv_cache, window)
        with current_device(query.device):
            if self._has_single:
                self._decode(output, query, kv_cache, shape)
            if self._chunks:
                self._prefill(output, query, kv_cache, shape)
        return output

    def _decode(self, output: Tensor, query: Tensor, kv_cache: Tensor, shape: KernelShape) -> None:
        from vllm_omni.layers.attention.triton_kernels import combine_splits, decode_splits

        metadata = self.metadata
        table, starts, lengths = metadata.block_table, metadata.query_starts_tensor, metadata.context_lens_tensor
        num_splits = min(MAX_SPLITS, -(-table.shape[1] * metadata.block_size // MIN_SPLIT))
        heads = (len(lengths), num_splits, query.shape[1])
        partial = torch.empty(*heads, query.shape[2], dtype=torch.float32, device=query.device)
        peaks, totals = torch.empty(2, *heads, dtype=torch.float32, device=query.device)
        decode_splits[(len(lengths), kv_cache.shape[3], num_splits)](
            query,
            kv_cache[0],
            kv_cache[1],
            table,
            starts,
            lengths,
            partial,
            peaks,
            totals,
            table.stride(0),
            query.stride(0),
            shape.scale,
            **shape.of_keys,
            **SPLITS,
            BLOCK_G=shape.decode_group,
        )
        combine_splits[(len(lengths), query.shape[1])](
            output,
            starts,
            lengths,
            partial,
            peaks,
            totals,
            num_splits,
            **shape.of_result,
            **SPLITS,
        )

    def _prefill(self, output: Tensor, query: Tensor, kv_cache: Tensor, shape: KernelShape) -> None:
        from vllm_omni.layers.attention.triton_kernels import prefill_tiles

        metadata, tile = self.metadata, shape.tile
        tiles = self._tiles.get(tile)
        if tiles is None:
            places = [[index, start] for index, length in self._chunks for start in range(0, length, tile)]
            tiles = self._tiles[tile] = torch.tensor(places, dtype=torch.int64, device=query.device)
        prefill_tiles[(len(tiles), kv_cache.shape[3])](
            output,
            query,
            kv_cache[0],
            kv_cache[1],
            metadata.block_table,
            metadata.query_starts_tensor,
            metadata.context_lens_tensor,
            tiles,
            metadata.block_table.stride(0),
            query.stride(0),
            shape.scale,
            **shape.of_keys,
            TILE=tile,
            BLOCK_G=shape.group,
        )


class KernelShape:
    """What the kernels of a layer are compiled for."""

    def __init__(self, query: Tensor, kv_cache: Tensor, window: int | None) -> None:
        num_heads, head_dim = query.shape[1:]
        page, num_kv_heads = kv_cache.shape[2:4]
        block_d = max(LEAST_ROWS, power_of_two(head_dim))
        row_bytes = block_d * query.element_size()
        self.group = power_of_two(num_heads // num_kv_heads)
        self.tile = max(1, min(TILE_ROWS, TILE_BYTES // row_bytes) // self.group)  # tokens
        self.scale = head_dim**-0.5 * math.log2(math.e)
        self.of_keys: dict[str, Any] = {
            "NUM_HEADS": num_heads,
            "NUM_KV_HEADS": num_kv_heads,
            "HEAD_DIM": head_dim,
            "PAGE": page,
            "WINDOW": window or 0,
            "BLOCK_N": min(64, max(LEAST_ROWS, BLOCK_BYTES // row_bytes)),
            "BLOCK_D": block_d,
            "PRECISION": "ieee",  # of float32 products; without it they are rounded to 10 bits
        }
        self.of_result = {name: self.of_keys[name] for name in OF_RESULT}
        self.decode_group = max(LEAST_ROWS, self.group)
