"""Runs a language model over the chunks of one step. Owns the weights, the KV pool and the tapped hidden states.

Token ids, positions, slot mapping and block tables of a step are made here and nowhere else. Knows no queue and no
sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many
from typing import cast

import torch
from torch import Tensor

from vllm_omni.core.ar.scheduler import Chunk
from vllm_omni.core.ar.sequence import Sequence
from vllm_omni.layers.attention.base import AttentionMetadata, PagedAttention
from vllm_omni.layers.attention.sdpa import SDPAAttention
from vllm_omni.layers.forward_context import ForwardContext, HiddenStateTaps
from vllm_omni.layers.token_inputs import InputRows, TokenInputs
from vllm_omni.worker.ar.language_model import LanguageModel, MediaReader
from vllm_omni.worker.ar.media_prompt import MediaItem


class ModelRunner:
    """One model with its own KV pool.

    tapped_layers: indices into `hidden_states` that will be read. can_sample: whether logits are needed; without them
    only the layers up to the last tapped one run, and only they have keys and values.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        num_blocks: int,
        block_size: int,
        tapped_layers: Many[int],
        can_sample: bool,
        device: torch.device,
        dtype: torch.dtype,
        attention: type[PagedAttention] = SDPAAttention,
    ) -> None:
        config = model.config
        self._model = model
        self._device = device
        self._block_size = block_size
        self._attention = attention
        self._num_layers = config.num_layers if can_sample else max(tapped_layers, default=0)
        pool = (self._num_layers, 2, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        # Not zeroed: nothing reads a slot before it is written, and pages that are never touched take no memory.
        self._kv_cache = torch.empty(pool, dtype=dtype, device=device)
        num_slots = num_blocks * block_size
        self._taps = (
            HiddenStateTaps(tapped_layers, num_slots, config.hidden_size, dtype, device) if tapped_layers else None
        )

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self._kv_cache.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the KV pool and of the tapped states."""
        return self._kv_cache.numel() * self._kv_cache.element_size() + (self._taps.num_bytes if self._taps else 0)

    @torch.inference_mode()
    def run(self, chunks: Many[Chunk], inputs: Mapping[int, TokenInputs] | None = None) -> Tensor:
        """Computes the tokens of all chunks -> logits [R, V] for those that sample, in their order. inputs: by sequence
        id, of the tokens of its chunk, where they are more than ids.
        """
        inputs = inputs or {}
        token_ids = [token for chunk in chunks for token in chunk.sequence.token_ids[chunk.start : chunk.end]]
        attention = self._attention(self._metadata(chunks))
        input_rows = self._input_rows(chunks, inputs) if inputs else None
        context = ForwardContext(attention, self._kv_cache, self._num_layers, self._taps, input_rows)
        states = self._model(self._tensor(token_ids), self._positions(chunks, inputs), context)
        ends = attention.metadata.query_starts[1:]
        rows = [end - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.samples]
        if not rows:
            return states.new_empty(0, self._model.config.vocab_size)
        return self._model.compute_logits(states[self._tensor(rows)])

    @torch.inference_mode()
    def encode(self, item: MediaItem) -> Tensor:
        """The rows [M, D] of one image, audio or video."""
        return cast(MediaReader, self._model).encode(item)

    def tapped_states(self, sequence: Sequence, layers: Many[int], start: int, stop: int) -> Tensor:
        """The states [stop - start, len(layers) * D] of the tokens [start, stop) of a sequence that still holds its
        blocks.
        """
        if self._taps is None or stop > sequence.num_computed_tokens:
            raise ValueError(f"layers {list(layers)} of tokens [{start}, {stop}): not tapped, or not computed yet")
        return self._taps.read(layers, self._tensor(self._slots(sequence, start, stop)))

    def _positions(self, chunks: Many[Chunk], inputs: Mapping[int, TokenInputs]) -> Tensor:
        """[N], or [3, N] in a step with sequences that have positions of their own."""
        if not inputs:
            return self._tensor([position for chunk in chunks for position in range(chunk.start, chunk.end)])
        parts = [
            inputs[chunk.sequence.sequence_id].positions
            if chunk.sequence.sequence_id in inputs
            else torch.arange(chunk.start, chunk.end, device=self._device).expand(3, -1)
            for chunk in chunks
        ]
        return torch.cat(parts, dim=1)

    def _input_rows(self, chunks: Many[Chunk], inputs: Mapping[int, TokenInputs]) -> InputRows | None:
        parts: list[tuple[int, InputRows]] = []
        start = 0
        for chunk in chunks:
            found = inputs.get(chunk.sequence.sequence_id)
            if found is not None and found.rows is not None:
                parts.append((start, found.rows))
            start += chunk.num_tokens
        return InputRows.join(parts)

    def _metadata(self, chunks: Many[Chunk]) -> AttentionMetadata:
        starts = [0]
        for chunk in chunks:
            starts.append(starts[-1] + chunk.num_tokens)
        most = max(len(chunk.sequence.block_table) for chunk in chunks)
        tables = [table + [0] * (most - len(table)) for table in (chunk.sequence.block_table for chunk in chunks)]
        return AttentionMetadata(
            slot_mapping=self._tensor([slot for c in chunks for slot in self._slots(c.sequence, c.start, c.end)]),
            query_starts=tuple(starts),
            context_lens=tuple(chunk.end for chunk in chunks),
            block_table=self._tensor(tables),
            block_size=self._block_size,
        )

    def _slots(self, sequence: Sequence, start: int, stop: int) -> list[int]:
        table, size = sequence.block_table, self._block_size
        return [table[position // size] * size + position % size for position in range(start, stop)]

    def _tensor(self, values: Many[int] | Many[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
