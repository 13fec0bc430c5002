"""The decoder of a language model on several ranks: each has its share of every layer's heads and widths, and of the
keys and values of all blocks. The first rank alone embeds, samples and holds tapped states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from vllm_omni import registry
from vllm_omni.layers.attention.base import AttentionMetadata, PagedAttention
from vllm_omni.layers.decoder import Decoder
from vllm_omni.layers.forward_context import ForwardContext
from vllm_omni.worker.ar.kv_pool import KVLayout
from vllm_omni.worker.ar.language_model import LanguageModelFolder
from vllm_omni.worker.ar.model_runner import share_of_pool
from vllm_omni.worker.parallel.group import ParallelGroup
from vllm_omni.worker.parallel.links import Links
from vllm_omni.worker.parallel.part import FollowerPart

KIND = "decoder"


def decoder_orders(
    model: LanguageModelFolder,
    layout: KVLayout,
    *,
    num_blocks: int,
    block_size: int,
    attention: str,
    dtype: torch.dtype,
    quantization: str | None,
) -> dict[str, Any]:
    """What a follower must know of a model and its pool. attention: a row of the registry."""
    return {
        "kind": KIND,
        "folder": str(model.folder),
        "part": model.part,
        "rope_scaling": None if model.rope_scaling is None else dict(model.rope_scaling),
        "weights_variant": model.weights_variant,
        "num_layers": layout.num_layers,
        "num_blocks": num_blocks,
        "block_size": block_size,
        "attention": attention,
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": quantization,
    }


class DecoderLead:
    """The first rank's side."""

    def __init__(self, group: ParallelGroup) -> None:
        self._group = group

    def guarded(self) -> AbstractContextManager[None]:
        """Around a step."""
        return self._group.guarded()

    def follow(self, states: Tensor, positions: Tensor, context: ForwardContext) -> None:
        metadata = context.attention.metadata
        most = -(-max(metadata.context_lens) // metadata.block_size)
        plain = [
            context.num_layers,
            metadata.query_starts,
            metadata.context_lens,
            metadata.block_size,
            sorted(metadata.query_only),
            context.rope_lengths is not None,
            context.wanted_rows is not None,
        ]
        others = [tensor for tensor in (context.rope_lengths, context.wanted_rows) if tensor is not None]
        tables = metadata.block_table[:, :most]
        self._group.send(plain, [states, positions, metadata.slot_mapping, tables, *others])


class DecoderPart(FollowerPart):
    """A follower's side."""

    def __init__(self, orders: Mapping[str, Any], links: Links) -> None:
        dtype: torch.dtype = getattr(torch, orders["dtype"])
        folder = LanguageModelFolder.open(
            Path(orders["folder"]),
            orders["part"],
            orders["rope_scaling"],
            orders["weights_variant"],
            reads_media=None,
        )
        shard = links.shard("tensor")
        self._decoder = cast(Decoder, folder.load_decoder(links.device, dtype, orders["quantization"], shard))
        self._attention: type[PagedAttention] = registry.resolve("attention", orders["attention"])
        config = folder.config
        layout = KVLayout(orders["num_layers"], shard.part(config.num_kv_heads), config.head_dim, (), 0)
        self._pool = share_of_pool(
            layout,
            num_blocks=orders["num_blocks"],
            block_size=orders["block_size"],
            device=links.device,
            dtype=dtype,
        )

    def step(self, plain: Any, tensors: Sequence[Tensor]) -> None:
        num_layers, query_starts, context_lens, block_size, query_only, has_lengths, has_wanted = plain
        states, positions, slots, block_table, *others = tensors
        metadata = AttentionMetadata(
            slot_mapping=slots,
            query_starts=tuple(query_starts),
            context_lens=tuple(context_lens),
            block_table=block_table,
            block_size=block_size,
            query_starts_tensor=torch.tensor(query_starts, device=slots.device),
            context_lens_tensor=torch.tensor(context_lens, device=slots.device),
            query_only=frozenset(query_only),
        )
        context = ForwardContext(
            self._attention(metadata),
            self._pool.kv_cache,
            num_layers,
            rope_lengths=others[0] if has_lengths else None,
            wanted_rows=others[-1] if has_wanted else None,
        )
        self._decoder(states, positions, context)
