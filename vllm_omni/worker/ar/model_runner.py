"""Runs a language model over the chunks of one step. Owns the weights and, through its KVPool, the keys, values and
tapped hidden states. Knows no queue and no sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from contextlib import nullcontext
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from vllm_omni.core.ar.scheduler import Chunk
from vllm_omni.core.ar.sequence import Sequence
from vllm_omni.layers.attention.base import PagedAttention
from vllm_omni.layers.attention.sdpa import SDPAAttention
from vllm_omni.layers.forward_context import ForwardContext
from vllm_omni.layers.kernel_choice import kernels_of, runs_layers_natively
from vllm_omni.layers.lora import AdapterMix, adapted, packed
from vllm_omni.layers.shard import WHOLE, Shard
from vllm_omni.layers.token_inputs import TokenInputs
from vllm_omni.utils.device import StepGraphs
from vllm_omni.worker.ar.batch import DecodeBatch, StepBatch, rope_lengths
from vllm_omni.worker.ar.decode_ahead import DecodeAhead
from vllm_omni.worker.ar.decode_graphs import DecodeGraphs
from vllm_omni.worker.ar.kv_pool import KVLayout, KVPool
from vllm_omni.worker.ar.language_model import LanguageModel, MediaReader
from vllm_omni.worker.ar.media_prompt import MediaItem
from vllm_omni.worker.ar.step_logits import ChosenTokens, StepLogits

if TYPE_CHECKING:
    from vllm_omni.worker.parallel.decoder import DecoderLead


def share_of_pool(
    layout: KVLayout, *, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
) -> KVPool:
    """What another rank holds of the pool of a runner whose model it shares: the same blocks, other heads."""
    return KVPool(layout, num_blocks=num_blocks, block_size=block_size, device=device, dtype=dtype)


class ModelRunner:
    """One model with its own KV pool."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        tapped_layers: Many[int],
        can_sample: bool,
        device: torch.device,
        dtype: torch.dtype,
        attention: type[PagedAttention] = SDPAAttention,
        max_model_len: int | None = None,
        decode_buckets: Many[int] = (),
        graphs: StepGraphs | None = None,
        shard: Shard = WHOLE,
        lead: DecoderLead | None = None,
    ) -> None:
        """tapped_layers: indices into `hidden_states` that will be read. can_sample: whether logits are needed; without
        them only the layers up to the last tapped one run, and only they have keys and values. max_model_len: tokens of
        a sequence; None: the model's positions. decode_buckets: the numbers of rows that a decode step is padded to;
        none: it is not padded. graphs: what captures the decode steps of each bucket, and what others capture. shard:
        the model's, where other ranks share its decoder, and lead: what has them follow.
        """
        config = model.config
        self._model = model
        self._attention = attention
        self._lead = lead
        self._scales_by_length = config.scaled_beyond is not None
        self._pool = KVPool(
            KVLayout.of(config, can_write=can_sample, tapped_layers=tapped_layers, shard=shard),
            num_blocks=num_blocks,
            block_size=block_size,
            device=device,
            dtype=dtype,
            has_scratch=bool(decode_buckets),
        )
        most_blocks = -(-(max_model_len or config.num_positions) // block_size)  # with a window more than held at once
        self._decode_batch = DecodeBatch(
            self._pool,
            max_num_seqs=max_num_seqs,
            max_num_blocks=most_blocks if config.window is not None else min(num_blocks, most_blocks),
            bucket_sizes=decode_buckets,
            input_size=config.hidden_size if model.joins_rows and decode_buckets else None,
        )
        self.graphs = graphs
        self._ahead = None if graphs is None or not decode_buckets else self._capture(graphs, decode_buckets)

    @property
    def model(self) -> LanguageModel:
        return self._model

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._pool.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self._pool.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the KV pool, tapped states included."""
        return self._pool.num_bytes

    @property
    def kernels(self) -> dict[str, str]:
        """What it computes with, as `kernels_of` says; layers: by one call (`native`) or operation by operation."""
        model = cast(nn.Module, self._model)
        is_native = self._attention.runs_layers and runs_layers_natively(model)
        return {**kernels_of([model]), "layers": "native" if is_native else "torch"}

    @torch.inference_mode()
    def run(
        self,
        chunks: Many[Chunk],
        inputs: Mapping[int, TokenInputs] | None = None,
        mixes: Many[AdapterMix | None] = (),
    ) -> StepLogits:
        """Computes the tokens of all chunks -> logits [R, V] for those that sample, in their order. inputs: by sequence
        id, of the tokens of its chunk, where they are more than ids. mixes: the adapters of each chunk; none: nobody
        has any.
        """
        with nullcontext() if self._lead is None else self._lead.guarded():
            return self._run(chunks, inputs or {}, mixes)

    def _run(
        self, chunks: Many[Chunk], inputs: Mapping[int, TokenInputs], mixes: Many[AdapterMix | None]
    ) -> StepLogits:
        is_adapted = any(mix is not None for mix in mixes)
        is_decode = self._decode_batch.fits(chunks)
        if self._ahead is not None:
            # captured without adapters
            if is_decode and not is_adapted and self._decode_batch.fills_buffers(chunks, inputs):
                return self._ahead.run(chunks, inputs)
            self._ahead.forget()
        batch = self._decode_batch.fill(chunks, inputs) if is_decode else StepBatch.of(chunks, inputs, self._pool)
        lengths = rope_lengths(chunks, len(batch.token_ids), self.device) if self._scales_by_length else None
        if not is_adapted:
            return self._compute(batch, lengths)
        num_padding = len(batch.token_ids) - sum(chunk.num_tokens for chunk in chunks)
        with adapted([*mixes, *[None] * num_padding]):
            return self._compute(batch, lengths, [*chunks, *[None] * num_padding])

    @property
    def can_run_ahead(self) -> bool:
        """Whether `run_ahead` begins steps."""
        return self._ahead is not None and not self._model.joins_rows

    @torch.inference_mode()
    def run_ahead(self, chunks: Many[Chunk], goes_on: Many[bool], choose: Callable[[StepLogits], ChosenTokens]) -> None:
        """Begins the step after that of these chunks, which has just been run, its tokens chosen and not read yet;
        those that go on have the block of one token more. choose: begins to choose the tokens of the new step.
        """
        assert self._ahead is not None
        self._ahead.begin(chunks, goes_on, choose)

    @torch.inference_mode()
    def encode(self, item: MediaItem) -> Tensor:
        """The rows [M, D] of one image, audio or video."""
        return cast(MediaReader, self._model).encode(item)

    def tapped_states(self, sequence: Sequence, layers: Many[int], start: int, stop: int) -> Tensor:
        """The states [stop - start, len(layers) * D] of the tokens [start, stop) of a sequence that still holds its
        blocks.
        """
        return self._pool.tapped_states(sequence, layers, start, stop)

    def _compute(self, batch: StepBatch, lengths: Tensor | None = None, chunks: Many[Chunk | None] = ()) -> StepLogits:
        """The logits of the rows that sample, and their states. lengths: as a ForwardContext's `rope_lengths`. chunks:
        where adapters act, those of the batch; None: a row of padding.
        """
        is_every = batch.samples_first_rows and len(batch.sampling_rows) == len(batch.token_ids)
        context = ForwardContext(
            self._attention(batch.attention),
            self._pool.kv_cache,
            self._pool.layout.num_layers,
            self._pool.taps,
            batch.input_rows,
            lengths,
            self._lead,
            None if is_every else batch.sampling_rows,
        )
        with packed(range(len(chunks)), [1 if chunk is None else chunk.num_tokens for chunk in chunks]):
            states = self._model(batch.token_ids, batch.positions, context)
        if not len(states):
            return StepLogits(states.new_empty(0, self._model.config.vocab_size), states=states)
        sampling = [(row, 1 + len(chunk.draft)) for row, chunk in enumerate(chunks) if chunk and chunk.samples]
        with packed([row for row, _ in sampling], [count for _, count in sampling]):
            return StepLogits(self._model.compute_logits(states), states=states)

    @torch.inference_mode()
    def _capture(self, graphs: StepGraphs, sizes: Many[int]) -> DecodeAhead:
        captured = DecodeGraphs(
            graphs,
            self._decode_batch,
            self._compute,
            sizes=sizes,
            vocab_size=self._model.config.vocab_size,
            state_size=self._model.config.hidden_size if self._model.joins_rows else None,
            device=self.device,
            dtype=self.dtype,
        )
        return DecodeAhead(captured, self._decode_batch)
