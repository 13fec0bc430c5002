"""Paged attention by torch's fused kernels."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_omni.layers.attention.base import AttentionMetadata, PagedAttention, causal_mask


class SDPAAttention(PagedAttention):
    """torch's fused kernels: one call per prompt chunk, and one per group of single-token queries with equally many
    blocks.

    A group is padded to whole blocks, which depends on the sequence alone: batch-mates change a row's result by no more
    than the rounding of torch's kernels.
    """

    def __init__(self, metadata: AttentionMetadata) -> None:
        super().__init__(metadata)
        starts = metadata.query_starts
        lengths = [stop - start for start, stop in pairwise(starts)]
        self._chunks = [index for index, length in enumerate(lengths) if length > 1]
        by_num_blocks: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            if length == 1:
                by_num_blocks.setdefault(-(-metadata.context_lens[index] // metadata.block_size), []).append(index)
        self._groups = [_DecodeGroup.of(metadata, *item) for item in by_num_blocks.items()]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor) -> Tensor:
        output = torch.zeros_like(query)
        for index in self._chunks:
            start, stop = self.metadata.query_starts[index : index + 2]
            if stop - start == self.metadata.context_lens[index]:  # a prompt from its first token: nothing to gather
                keys, values, mask = key[start:stop], value[start:stop], None
            else:
                keys, values = self.gather(index, kv_cache)
                mask = causal_mask(stop - start, len(keys), query.device)
            output[start:stop] = _sdpa(query[None, start:stop], keys[None], values[None], mask)[0]
        for group in self._groups:
            keys, values = group.gather(kv_cache)
            output[group.rows] = _sdpa(query[group.rows, None], keys, values, group.mask[:, None, None])[:, 0]
        return output


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """G single-token queries whose sequences have equally many blocks: the same padded length P."""

    rows: Tensor  # [G] rows of the query
    blocks: Tensor  # [G, blocks]
    mask: Tensor  # [G, P] bool, True where there is a token
    is_vacant: Tensor  # [G, block_size] bool, True where the last block has none

    @classmethod
    def of(cls, metadata: AttentionMetadata, num_blocks: int, members: list[int]) -> _DecodeGroup:
        device = metadata.block_table.device
        lengths = torch.tensor([metadata.context_lens[index] for index in members], device=device)
        mask = torch.arange(num_blocks * metadata.block_size, device=device) < lengths[:, None]
        return cls(
            rows=torch.tensor([metadata.query_starts[index] for index in members], device=device),
            blocks=metadata.block_table[torch.tensor(members, device=device), :num_blocks],
            mask=mask,
            is_vacant=~mask[:, -metadata.block_size :],
        )

    def gather(self, kv_cache: Tensor) -> Tensor:
        """[2, G, P, K, D]. Slots without a token, all in the last block, are zeroed: what stands there may be NaN, and
        0 * NaN is NaN.
        """
        blocks = kv_cache[:, self.blocks]  # [2, G, blocks, block_size, K, D]
        blocks[:, :, -1].masked_fill_(self.is_vacant[None, :, :, None, None], 0)
        return blocks.flatten(2, 3)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """query: [B, q, H, D]; key, value: [B, L, K, D]; without a mask causal from the first token on -> [B, q, H, D]."""
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return attended.transpose(1, 2)
