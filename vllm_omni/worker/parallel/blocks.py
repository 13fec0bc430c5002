"""The blocks of a diffusion transformer on several ranks. The first rank alone embeds, decides by its step caches what
is computed, and samples; it sends what goes into some blocks, and all ranks run these.

Legend: L tokens of a row, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_omni import registry
from vllm_omni.layers.shard import Shards
from vllm_omni.worker.diffusion.diffusion_model import TokenBatch
from vllm_omni.worker.diffusion.shared_model import BlockStack, SharedTokens
from vllm_omni.worker.parallel.group import ParallelGroup
from vllm_omni.worker.parallel.links import Links
from vllm_omni.worker.parallel.part import FollowerPart

KIND = "blocks"


def shards_of(links: Links) -> Shards:
    """A rank's share of the blocks."""
    return Shards(links.shard("tensor"), links.shard("sequence"))


def block_orders(name: str, folder: Path, variant: str | None, dtype: torch.dtype, quantization: str | None) -> Any:
    """What a follower must know of a model. name: its row of the registry's table "diffusion model"."""
    return {
        "kind": KIND,
        "name": name,
        "folder": str(folder),
        "weights_variant": variant,
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": quantization,
    }


class BlocksLead:
    """The first rank's side. blocks: of its model, built for its share."""

    def __init__(self, group: ParallelGroup, blocks: BlockStack) -> None:
        self._group = group
        self._blocks = blocks

    def run_blocks(self, tokens: SharedTokens, start: int, stop: int) -> TokenBatch:
        """Blocks start .. stop - 1, on all ranks."""
        plain, tensors = tokens.content()
        with self._group.guarded():
            self._group.send([start, stop, plain], tensors)
            return _run(self._group.links, self._blocks, tokens, start, stop)


class BlocksPart(FollowerPart):
    """A follower's side."""

    def __init__(self, orders: Mapping[str, Any], links: Links) -> None:
        spec = registry.resolve("diffusion model", orders["name"])(Path(orders["folder"]), orders["weights_variant"])
        dtype = getattr(torch, orders["dtype"])
        self._links = links
        self._blocks: BlockStack = spec.load_blocks(links.device, dtype, orders["quantization"], shards_of(links))

    def step(self, plain: Any, tensors: Sequence[Tensor]) -> None:
        start, stop, content = plain
        _run(self._links, self._blocks, self._blocks.read_tokens(content, tensors), start, stop)


def _run(links: Links, blocks: BlockStack, tokens: SharedTokens, start: int, stop: int) -> TokenBatch:
    """What one rank does. Along the axis `guidance` each takes some rows, and gets those of the others."""
    guidance = links.shard("guidance")
    if guidance.is_whole:
        return blocks.run_blocks(tokens, start, stop)
    before = tokens.per_row()
    lengths = [len(row) for row in before]
    shares = row_shares(lengths, guidance.size)
    mine = shares[guidance.rank]
    made = torch.zeros_like(before[0][:0])
    if mine:
        chosen = tokens if len(mine) == len(before) else tokens.select(mine)
        made = torch.cat(blocks.run_blocks(chosen, start, stop).per_row())
    most = max(sum(lengths[row] for row in share) for share in shares)
    padding = made.new_zeros(most - len(made), made.shape[1])  # so that all shares have one shape
    found = guidance.connected.gather(torch.cat([made, padding]))
    rows: list[Tensor] = []
    for part, share in zip(found, shares, strict=True):
        own = [lengths[row] for row in share]
        rows += part[: sum(own)].split(own) if own else ()
    return tokens.with_rows(rows)


def row_shares(lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """Neighbouring rows for each rank, so that each has about as many tokens; a rank may get none."""
    total = sum(lengths)
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    for row, (length, stop) in enumerate(zip(lengths, accumulate(lengths), strict=True)):
        middle = stop - length / 2
        shares[min(int(middle * num_shares / total), num_shares - 1)].append(row)
    return shares
