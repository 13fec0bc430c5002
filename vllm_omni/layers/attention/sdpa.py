"""Paged attention by torch's fused kernels."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_omni.layers.attention.base import AttentionMetadata, PagedAttention, causal_mask, first_seen


class SDPAAttention(PagedAttention):
    """torch's fused kernels: one call per prompt chunk, and one per group of single-token queries with equally many
    blocks.

    A group is padded to whole blocks, which depends on the sequence alone: batch-mates change a row's result by no more
    than the rounding of torch's kernels.
    """

    takes_query_only = True  # one by one, each would gather the keys that all of them see

    def __init__(self, metadata: AttentionMetadata) -> None:
        super().__init__(metadata)
        lengths = [stop - start for start, stop in pairwise(self.metadata.query_starts)]
        self._chunks = [index for index, length in enumerate(lengths) if length > 1]
        self._single = [index for index, length in enumerate(lengths) if length == 1]
        self._groups: dict[int | None, list[_DecodeGroup]] = {}  # by window, planned when the first layer asks

    def attend(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, window: int | None) -> Tensor:
        if window is not None and window >= max(self.metadata.context_lens):  # nothing is hidden yet
            window = None
        groups = self._groups.get(window)
        if groups is None:
            groups = self._groups[window] = self._plan(window)
        # 1 a step of one group: no rows to pick out and put back
        if not self._chunks and len(groups) == 1:
            return groups[0].attend(query, kv_cache)
        output = torch.empty_like(query)
        # 2 chunks of several tokens, one call each
        for index in self._chunks:
            rows = slice(*self.metadata.query_starts[index : index + 2])
            output[rows] = self._attend_chunk(index, query[rows], key[rows], value[rows], kv_cache, window)
        # 3 single tokens, one call per group
        for group in groups:
            output[group.rows] = group.attend(query[group.rows], kv_cache)
        return output

    def _attend_chunk(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, window: int | None
    ) -> Tensor:
        """Several tokens of one sequence; query: [q, H, D] -> [q, H, D]."""
        if index in self.metadata.query_only:
            keys, values = self.gather(index, kv_cache, None)
            return _sdpa(query[None], keys[None], values[None], None, is_causal=False)[0]
        length = self.metadata.context_lens[index]
        is_whole = len(query) == length  # a prompt from its first token: nothing to gather
        keys, values = (key, value) if is_whole else self.gather(index, kv_cache, window)
        is_plain = is_whole and (window is None or length <= window)
        mask = None if is_plain else causal_mask(len(query), len(keys), query.device, window)
        return _sdpa(query[None], keys[None], values[None], mask)[0]

    def _plan(self, window: int | None) -> list[_DecodeGroup]:
        """The single tokens, by how many blocks they see."""
        size, lengths = self.metadata.block_size, self.metadata.context_lens
        by_num_blocks: dict[int, list[int]] = {}
        for index in self._single:
            num_skipped = 0 if window is None else first_seen(lengths[index] - 1, window) // size
            by_num_blocks.setdefault(-(-lengths[index] // size) - num_skipped, []).append(index)
        return [_DecodeGroup.of(self.metadata, *item, window) for item in by_num_blocks.items()]


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """G single-token queries whose sequences see equally many blocks: the same padded length P."""

    rows: Tensor | slice  # [G] rows of the query
    blocks: Tensor  # [G, blocks]
    mask: Tensor  # [G, P] bool, True where there is a token that is seen
    is_vacant: Tensor  # [G, block_size] bool, True where the last block has none

    @classmethod
    def of(cls, metadata: AttentionMetadata, num_blocks: int, members: list[int], window: int | None) -> _DecodeGroup:
        device, size = metadata.block_table.device, metadata.block_size
        rows: Tensor | slice = slice(None)
        tables, lengths = metadata.block_table, metadata.context_lens_tensor
        if len(members) < len(metadata.context_lens):
            indices = torch.tensor(members, device=device)
            rows = metadata.query_starts_tensor[indices]
            tables, lengths = tables[indices], lengths[indices]
        positions = torch.arange(num_blocks * size, device=device)
        if window is None:
            blocks, mask = tables[:, :num_blocks], positions < lengths[:, None]
            return cls(rows, blocks, mask, is_vacant=~mask[:, -size:])
        first = (lengths - window).clamp_min(0)[:, None] // size  # the blocks before it are not seen
        blocks = tables.gather(1, first + torch.arange(num_blocks, device=device))
        positions = first * size + positions
        has_token = positions < lengths[:, None]
        is_seen = has_token & (positions >= lengths[:, None] - window)
        return cls(rows, blocks, is_seen, is_vacant=~has_token[:, -size:])

    def attend(self, query: Tensor, kv_cache: Tensor) -> Tensor:
        """query: [G, H, D] -> [G, H, D]."""
        keys, values = self.gather(kv_cache)
        return _sdpa(query[:, None], keys, values, self.mask[:, None, None])[:, 0]

    def gather(self, kv_cache: Tensor) -> Tensor:
        """[2, G, P, K, D]. Slots without a token, all in the last block, are zeroed: what stands there may be NaN, and
        0 * NaN is NaN.
        """
        blocks = kv_cache[:, self.blocks]  # [2, G, blocks, block_size, K, D]
        blocks[:, :, -1].masked_fill_(self.is_vacant[None, :, :, None, None], 0)
        return blocks.flatten(2, 3)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool = True) -> Tensor:
    """query: [B, q, H, D]; key, value: [B, L, K, D]; without a mask causal from the first token on, where it is causal
    -> [B, q, H, D].
    """
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal and mask is None,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return attended.transpose(1, 2)
