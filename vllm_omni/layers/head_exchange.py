"""Full attention of rows whose tokens are shared out to ranks (DeepSpeed-Ulysses, arXiv 2309.14509): before it every
rank gives each other one that one's heads of its tokens, so that it attends with some heads over all tokens, and behind
it the tokens come back.

Legend: S ranks, R rows, H heads, n tokens of a row that a rank has, L = S n, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_omni.layers.banded import attention
from vllm_omni.layers.shard import Shard


def attention_of_share(query: Tensor, key: Tensor, value: Tensor, sequence: Shard) -> Tensor:
    """[R, H, n, d] each -> [R, H, n, d], attended to the tokens of all ranks."""
    if sequence.is_whole:
        return attention(query, key, value)
    size, peers = sequence.size, sequence.connected
    mine = torch.stack([query, key, value])  # [3, R, H, n, d]
    by_rank = mine.unflatten(2, (size, sequence.part(mine.shape[2]))).movedim(2, 0)  # [S, 3, R, H / S, n, d]
    whole = peers.exchange(by_rank).movedim(0, 3).flatten(3, 4)  # [3, R, H / S, L, d]
    attended = attention(*whole.unbind())
    back = attended.unflatten(2, (size, -1)).movedim(2, 0)  # [S, R, H / S, n, d]
    return peers.exchange(back).movedim(0, 1).flatten(1, 2)
