"""How large the KV pool of a language model is, and what a step needs besides. Arithmetic alone; allocates nothing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from vllm_omni.errors import ConfigError
from vllm_omni.worker.ar.language_model import LanguageModelConfig

DEFAULT_POOL_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class KVPoolPlan:
    """A pool of equal blocks."""

    num_blocks: int
    block_bytes: int  # keys, values and tapped states
    limited_by: str  # the key that set the number of blocks


def plan_kv_pool(
    model: LanguageModelConfig,
    *,
    itemsize: int,
    block_size: int,
    can_write: bool,
    tapped_layers: Collection[int],
    model_len: int,
    max_num_seqs: int,
    kv_memory_mb: float | None,
    num_blocks: int | None,
) -> KVPoolPlan:
    """Enough blocks for max_num_seqs full sequences, in at most kv_memory_mb (256), unless their number is given;
    ConfigError when not one fits.
    """
    num_kv_layers = model.num_layers if can_write else max(tapped_layers)
    kv_width = num_kv_layers * 2 * model.num_kv_heads * model.head_dim
    block_bytes = (kv_width + len(set(tapped_layers)) * model.hidden_size) * itemsize * block_size
    if num_blocks is not None:
        return KVPoolPlan(num_blocks, block_bytes, "num_blocks")
    needed = -(-model_len // block_size) * max_num_seqs
    if kv_memory_mb is None:
        affordable, limit = max(1, DEFAULT_POOL_BYTES // block_bytes), "the default of 256 MB"
    else:
        affordable, limit = int(kv_memory_mb * 2**20) // block_bytes, "kv_memory_mb"
    if affordable == 0:
        raise ConfigError(f"kv_memory_mb: got {kv_memory_mb:g}, expected at least {block_bytes / 2**20:.3g}, one block")
    return KVPoolPlan(min(needed, affordable), block_bytes, "max_num_seqs" if needed <= affordable else limit)


def activation_bytes(
    model: LanguageModelConfig, *, itemsize: int, max_num_batched_tokens: int, max_num_seqs: int, can_write: bool
) -> int:
    """The widest moment of a step: a layer's residual, normed states and MLP, or the logits with a float32 copy."""
    layer = max_num_batched_tokens * (4 * model.hidden_size + 3 * model.intermediate_size) * itemsize
    logits = max_num_seqs * model.vocab_size * (itemsize + 4) if can_write else 0
    return max(layer, logits)
