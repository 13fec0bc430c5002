"""The KV pool of a language model: what a token holds in it, how many blocks are affordable, and the memory itself.

Knows no queue: who holds which block is the BlockManager's, and comes with the sequences.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_omni.core.ar.cache_window import CacheWindow
from vllm_omni.core.ar.sequence import Sequence
from vllm_omni.errors import ConfigError
from vllm_omni.layers.forward_context import HiddenStateTaps
from vllm_omni.layers.shard import WHOLE, Shard
from vllm_omni.worker.ar.language_model import LanguageModelConfig

MAX_DEFAULT_BLOCKS = 65_536  # unasked; each costs some memory of its own, which a config's numbers must not blow up
DEFAULT_POOL = "what the memory budget leaves (resources.max_memory_gb, free memory)"


@dataclass(frozen=True, slots=True)
class KVPoolPlan:
    """How large a pool is to be."""

    num_blocks: int
    block_bytes: int  # of one block: keys, values and tapped states of its tokens
    limited_by: str  # the setting that gave the number of blocks
    num_wanted: int = 0  # how many more blocks could be used, where no setting says how many there are


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What the pool holds of one token."""

    num_layers: int  # layers that run; each has keys and values
    num_kv_heads: int
    head_dim: int
    tapped_layers: tuple[int, ...]  # indices into `hidden_states`, ascending
    hidden_size: int  # width of a tapped state

    @classmethod
    def of(
        cls, model: LanguageModelConfig, *, can_write: bool, tapped_layers: Collection[int], shard: Shard = WHOLE
    ) -> KVLayout:
        """All layers when the model writes, else those up to the last tapped one. shard: whose key-value heads."""
        return cls(
            num_layers=model.num_layers if can_write else max(tapped_layers, default=0),
            num_kv_heads=shard.part(model.num_kv_heads),
            head_dim=model.head_dim,
            tapped_layers=tuple(sorted(set(tapped_layers))),
            hidden_size=model.hidden_size,
        )

    def token_bytes(self, itemsize: int) -> int:
        """Bytes of one token, over all layers."""
        keys_and_values = self.num_layers * 2 * self.num_kv_heads * self.head_dim
        return (keys_and_values + len(self.tapped_layers) * self.hidden_size) * itemsize


class KVPool:
    """Keys, values and tapped states of `num_blocks` blocks of `block_size` tokens.

    With `has_scratch` there is one more block behind them, which no sequence ever holds: padding rows of a batch write
    there.
    """

    def __init__(
        self,
        layout: KVLayout,
        *,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
        has_scratch: bool = False,
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self.dtype = dtype
        self.scratch_block = num_blocks if has_scratch else None
        allocated = num_blocks + has_scratch
        shape = (layout.num_layers, 2, allocated, block_size, layout.num_kv_heads, layout.head_dim)
        # Not zeroed: nothing reads a slot before it is written, and pages that are never touched take no memory.
        self.kv_cache = torch.empty(shape, dtype=dtype, device=device)
        num_slots = allocated * block_size
        self.taps = (
            HiddenStateTaps(layout.tapped_layers, num_slots, layout.hidden_size, dtype, device)
            if layout.tapped_layers
            else None
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys, the values and the tapped states."""
        return self.kv_cache.numel() * self.kv_cache.element_size() + (self.taps.num_bytes if self.taps else 0)

    def slots(self, sequence: Sequence, start: int, stop: int) -> list[int]:
        """The slots (block * block_size + offset) of the tokens [start, stop) of a sequence that holds their blocks."""
        table, size = sequence.block_table, self.block_size
        return [table[position // size] * size + position % size for position in range(start, stop)]

    def tapped_states(self, sequence: Sequence, layers: Many[int], start: int, stop: int) -> Tensor:
        """The states [stop - start, len(layers) * D] of the tokens [start, stop) of a sequence that still holds its
        blocks.
        """
        if self.taps is None or stop > sequence.num_computed_tokens:
            raise ValueError(f"layers {list(layers)} of tokens [{start}, {stop}): not tapped, or not computed yet")
        slots = torch.tensor(self.slots(sequence, start, stop), dtype=torch.int64, device=self.device)
        return self.taps.read(layers, slots)


def plan_kv_pool(
    model: LanguageModelConfig,
    *,
    itemsize: int,
    block_size: int,
    can_write: bool,
    tapped_layers: Collection[int],
    model_len: int,
    least_len: int,
    max_num_seqs: int,
    kv_memory_mb: float | None,
    num_blocks: int | None,
    granted_bytes: int,
    window: CacheWindow | None = None,
    shard: Shard = WHOLE,
) -> KVPoolPlan:
    """`num_blocks` blocks where that is given, else enough for max_num_seqs sequences of model_len tokens in at most
    kv_memory_mb; where that is not given either, in the memory of one sequence of least_len tokens and granted_bytes
    besides, and then no more than MAX_DEFAULT_BLOCKS. ConfigError when not one block fits into kv_memory_mb. window:
    what of a sequence is held, where that is not all of it. shard: of the first of the ranks that hold a part of every
    block each; all bytes are those of one rank.
    """
    layout = KVLayout.of(model, can_write=can_write, tapped_layers=tapped_layers, shard=shard)
    block_bytes = layout.token_bytes(itemsize) * block_size
    if num_blocks is not None:
        return KVPoolPlan(num_blocks, block_bytes, "num_blocks")
    one_sequence = -(-model_len // block_size)
    if window is not None:
        one_sequence = min(one_sequence, window.most_blocks(block_size))
    needed = one_sequence * max_num_seqs
    if kv_memory_mb is None:
        least = min(one_sequence, -(-least_len // block_size))
        needed = min(needed, max(least, MAX_DEFAULT_BLOCKS))
        affordable, limit = least + granted_bytes // block_bytes, DEFAULT_POOL
    else:
        affordable, limit = int(kv_memory_mb * 2**20) // block_bytes, "kv_memory_mb"
    if affordable == 0:
        raise ConfigError(f"kv_memory_mb: got {kv_memory_mb:g}, expected at least {block_bytes / 2**20:.3g}, one block")
    num_wanted = max(needed - affordable, 0) if kv_memory_mb is None else 0
    name = "max_num_seqs" if needed <= affordable else limit
    return KVPoolPlan(min(needed, affordable), block_bytes, name, num_wanted)


def activation_bytes(
    model: LanguageModelConfig, *, itemsize: int, max_num_batched_tokens: int, max_num_seqs: int, can_write: bool
) -> int:
    """The widest moment of a step: a layer's residual, normed states and MLP, or the logits with a float32 copy."""
    layer = max_num_batched_tokens * (4 * model.hidden_size + 3 * model.intermediate_size) * itemsize
    logits = max_num_seqs * model.vocab_size * (itemsize + 4) if can_write else 0
    return max(layer, logits)
