"""What one forward pass of a language model needs besides its tokens: the paged cache, and the hidden states to keep.

Legend: N tokens of a step, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vllm_omni.layers.attention.base import PagedAttention
from vllm_omni.layers.token_inputs import InputRows


class HiddenStateTaps:
    """Side storage of tapped hidden states, kept per slot of the KV pool, so that whatever serves a prefix serves its
    states too.

    layers: indices into transformers' `hidden_states` (0 the embeddings, i the state after layer i, the last one after
    the final norm).
    """

    def __init__(
        self, layers: Sequence[int], num_slots: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._columns = {layer: column for column, layer in enumerate(sorted(set(layers)))}
        self._states = torch.empty(len(self._columns), num_slots, hidden_size, dtype=dtype, device=device)

    @property
    def layers(self) -> list[int]:
        """Ascending."""
        return list(self._columns)

    def write(self, layer: int, states: Tensor, slots: Tensor) -> None:
        """states: [N, D] of one layer, slots: [N]; layers that are not tapped are passed over."""
        if layer in self._columns:
            self._states[self._columns[layer]].index_copy_(0, slots, states)

    def read(self, layers: Sequence[int], slots: Tensor) -> Tensor:
        """slots: [T] -> a new tensor [T, len(layers) * D], the layers side by side."""
        return torch.cat([self._states[self._columns[layer]].index_select(0, slots) for layer in layers], dim=-1)

    @property
    def num_bytes(self) -> int:
        return self._states.numel() * self._states.element_size()


class Followers(Protocol):
    """The other ranks of a decoder of which this one has a share."""

    def follow(self, states: Tensor, positions: Tensor, context: ForwardContext) -> None:
        """Has them run the pass that begins: as the arguments of a Decoder. The rows that the context wants are those
        that the last layer computes.
        """


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """What a forward pass needs besides tokens and positions."""

    attention: PagedAttention
    kv_cache: Tensor  # [num_layers, 2, blocks, block_size, kv heads, head size]
    num_layers: int  # how many layers run; when all do, the final norm follows
    taps: HiddenStateTaps | None = None
    input_rows: InputRows | None = None  # what joins or replaces embeddings, for models that are fed such
    rope_lengths: Tensor | None = None  # [N] int64, as RotaryEmbedding's, for models whose rotary positions need them
    followers: Followers | None = None  # whom the decoder's first rank tells of each pass
    wanted_rows: Tensor | None = None  # [R] int64, ascending: the tokens whose last states are wanted; None: all

    def stops(self, depth: int) -> list[int]:
        """Behind which layers of a model of this depth something is to be done: those that are tapped, and the last
        that runs.
        """
        tapped = self.taps.layers if self.taps is not None else ()
        return sorted({layer for layer in tapped if 0 < layer < min(self.num_layers, depth)} | {self.num_layers} - {0})

    def wanted(self, rows: Tensor) -> Tensor:
        """Of [N, ...] those that are wanted, [R, ...]."""
        return rows if self.wanted_rows is None else rows[self.wanted_rows]

    def taps_all(self, layer: int) -> bool:
        """Whether the states of all tokens are kept at an index of `hidden_states`."""
        return self.taps is not None and layer in self.taps.layers

    def tap(self, layer: int, states: Tensor) -> None:
        """Offers the states of one index of `hidden_states`, [N, D]."""
        if self.taps is not None:
            self.taps.write(layer, states, self.attention.metadata.slot_mapping)
