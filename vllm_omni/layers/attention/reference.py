"""The definition of paged attention, which every other backend is tested against."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from vllm_omni.layers.attention.base import PagedAttention, causal_mask


class ReferenceAttention(PagedAttention):
    """The definition: one sequence after the other, softmax in float32."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, window: int | None) -> Tensor:
        output = torch.zeros_like(query)
        starts = self.metadata.query_starts
        for index, (start, stop) in enumerate(pairwise(starts)):
            queries = query[start:stop].float()  # [q, H, D]
            group = query.shape[1] // key.shape[1]
            keys, values = self.gather(index, kv_cache, window).float().repeat_interleave(group, dim=2)  # [n, H, D]
            scores = torch.einsum("qhd,lhd->hql", queries, keys) * query.shape[2] ** -0.5
            is_seen = causal_mask(stop - start, len(keys), query.device, window)
            scores = scores.masked_fill(~is_seen, float("-inf"))
            output[start:stop] = torch.einsum("hql,lhd->qhd", scores.softmax(-1), values).to(query.dtype)
        return output
