"""Attention within rows of equal length: of everything, or of a band around the diagonal. Knows no model.

Legend: B rows, H query heads, K key-value heads, L tokens of a row, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_omni.layers.band import Band
from vllm_omni.layers.native.full_attention import attend_fully, fits
from vllm_omni.layers.native.library import Kernels, kernels_for
from vllm_omni.utils.device import is_cpu

MIN_BLOCK = 64
MAX_SHORT_SCORES = 2**18  # of a row: up to so many, two float32 products on the CPU beat the blocks of flash attention
MASKED_REACHES = 4  # rows of up to so many reaches of a band are faster with one mask over all than block by block


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, H, q, d], [B, K, k, d] twice, mask [B, 1, q, k] -> [B, H, q, d]. mask: bools, or what is added to scores."""
    functions = _functions(query, key) if mask is None else None
    if functions is not None:
        return _attended(functions, query, key, value, None)
    scores_of_row = query.shape[1] * query.shape[2] * key.shape[2]
    if mask is None and is_cpu(query.device) and query.dtype == torch.float32 and scores_of_row <= MAX_SHORT_SCORES:
        return short_attention(query, key, value)
    grouped_queries = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped_queries)


def short_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`attention` with all scores in memory at once, the queries that share a key in one multiplication."""
    num_rows, num_heads, length, size = query.shape
    stacked = num_rows * key.shape[1]
    queries = query.reshape(stacked, -1, size)  # [B K, H / K q, d]
    keys, values = key.reshape(stacked, -1, size), value.reshape(stacked, -1, size)
    unread = queries.new_empty(1, 1, 1)
    scores = torch.baddbmm(unread, queries, keys.transpose(1, 2), beta=0, alpha=size**-0.5)
    return torch.bmm(scores.softmax(dim=-1), values).view(num_rows, num_heads, length, size)


def banded_attention(query: Tensor, key: Tensor, value: Tensor, band: Band) -> Tensor:
    """Attention of every token to what its band shows of the row, in the way that suits the length. Shapes as
    `attention`, q = k = L.
    """
    length = query.shape[2]
    if band.covers(length):
        return attention(query, key, value)
    functions = _functions(query, key)
    if functions is not None:
        return _attended(functions, query, key, value, band)
    if length > MASKED_REACHES * max(band.back, band.ahead, 1) * band.block:
        return blockwise_attention(query, key, value, band)
    positions = torch.arange(length, device=query.device)
    return attention(query, key, value, band.sees(positions[:, None], positions)[None, None])


def blockwise_attention(query: Tensor, key: Tensor, value: Tensor, band: Band) -> Tensor:
    """`banded_attention` block by block, so that time and memory grow with L and not with its square."""
    num_rows, _, length, _ = query.shape
    before, behind = band.back * band.block, band.ahead * band.block  # that a block sees beside itself
    block = -(-max(before, behind, MIN_BLOCK) // band.block) * band.block
    num_blocks = -(-(band.offset + length) // block)
    missing = num_blocks * block - length - band.offset
    queries = F.pad(query, (0, 0, band.offset, missing)).unflatten(2, (num_blocks, block)).transpose(1, 2).flatten(0, 1)
    keys, values = (
        F.pad(x, (0, 0, before + band.offset, behind + missing)).unfold(2, before + block + behind, block)
        for x in (key, value)
    )  # [rows, K, blocks, d, before + block + behind]
    starts = torch.arange(num_blocks, device=query.device)[:, None, None] * block - band.offset
    asking = starts + torch.arange(block, device=query.device)[:, None]
    read = starts - before + torch.arange(before + block + behind, device=query.device)
    is_seen = band.sees(asking, read) & (read >= 0) & (read < length)
    is_seen |= (asking < 0) | (asking >= length)  # padding must see something; it is cut off below
    mask = is_seen[:, None].repeat(num_rows, 1, 1, 1)
    keys, values = (x.permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (keys, values))
    attended = attention(queries, keys, values, mask).unflatten(0, (num_rows, num_blocks)).transpose(1, 2).flatten(2, 3)
    return attended[:, :, band.offset : band.offset + length]


def _functions(query: Tensor, key: Tensor) -> Kernels | None:
    """The package's own kernels, where they take such heads."""
    is_fit = fits(query.shape[1], key.shape[1], query.shape[3])
    return kernels_for(query, key) if is_fit else None


def _attended(functions: Kernels, query: Tensor, key: Tensor, value: Tensor, band: Band | None) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # as they stand in memory
    attended = attend_fully(functions, query, key, value, band)
    return attended.unflatten(-1, (query.shape[2], -1)).transpose(1, 2)
