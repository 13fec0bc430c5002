"""The layers of a decoder run by one call of the kernels. What they compute is `layers.decoder`'s to say.

Legend: N tokens of a step, R of them whose last states are wanted, D hidden size, d head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_omni.layers.attention.base import AttentionMetadata
from vllm_omni.layers.linear import Linear
from vllm_omni.layers.native.attention import fits, step_struct
from vllm_omni.layers.native.library import Kernels, kernels, pointer, threads_for
from vllm_omni.layers.native.packed import NativePacking, can_gate, linear_struct
from vllm_omni.layers.native.structures import (
    CacheStruct,
    HeadsStruct,
    LayerStruct,
    LinearStruct,
    ShapeStruct,
    WantedStruct,
)


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What one layer computes with."""

    attention_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    mlp_norm: Tensor
    qkv: Linear
    output: Linear
    gate_up: Linear
    down: Linear
    window: int | None

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.output, self.gate_up, self.down

    def struct(self) -> LayerStruct:
        """Pointers into the parts, which must outlive it."""
        norms = (self.attention_norm, self.query_norm, self.key_norm, self.mlp_norm)
        return LayerStruct(*map(pointer, norms), *map(struct_of, self.linears), self.window or 0)


class NativeLayers:
    """Those of one decoder, whose weights are packed and stay where they are."""

    def __init__(self, layers: Sequence[LayerParts], heads: HeadsStruct, epsilon: float, functions: Kernels) -> None:
        first = layers[0]
        self._kernels = functions
        self._dtype = first.attention_norm.dtype
        self._layers = (LayerStruct * len(layers))(*(layer.struct() for layer in layers))
        self._shape = ShapeStruct(first.qkv.in_features, first.down.in_features, heads, epsilon)
        self._weights = sum(linear.weight.numel() for linear in first.linears)  # of one layer
        self._caches: tuple[tuple[int, torch.Size], ctypes.Array[CacheStruct]] | None = None

    @classmethod
    def find(
        cls, layers: Sequence[LayerParts], num_heads: int, num_kv_heads: int, head_dim: int, epsilon: float
    ) -> NativeLayers | None:
        """None where the kernels do not take such layers, or their weights are packed in another way."""
        if not layers or not fits(num_heads, num_kv_heads, head_dim):
            return None
        if not all(isinstance(linear.packing, NativePacking) for layer in layers for linear in layer.linears):
            return None
        if not all(can_gate(layer.gate_up.out_features) for layer in layers):
            return None
        functions = kernels(layers[0].attention_norm.dtype)
        heads = HeadsStruct(num_heads, num_kv_heads, head_dim, 0, head_dim**-0.5)
        return None if functions is None else cls(layers, heads, epsilon, functions)

    def run(
        self,
        first: int,
        last: int,
        states: Tensor,
        cos: Tensor,
        sin: Tensor,
        metadata: AttentionMetadata,
        kv_cache: Tensor,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """The layers [first, last) from states [N, D], the model's dtype; cos, sin: [N, 1, d]; kv_cache: [layers, 2,
        blocks, block_size, kv heads, d]; wanted: [R] int64, ascending, the rows that go on behind the keys and values
        of the last layer; None: all -> [R, D].
        """
        assert states.dtype == kv_cache.dtype == cos.dtype == self._dtype
        states = states.clone(memory_format=torch.contiguous_format)
        self._kernels.run_layers(
            ctypes.byref(self._layers, first * ctypes.sizeof(LayerStruct)),
            last - first,
            self._shape,
            step_struct(metadata),
            pointer(cos),
            pointer(sin),
            ctypes.byref(self._cache_structs(kv_cache), first * ctypes.sizeof(CacheStruct)),
            WantedStruct(pointer(wanted), len(states) if wanted is None else len(wanted)),
            states.data_ptr(),
            threads_for(len(states) * self._weights),
        )
        return states if wanted is None else states[: len(wanted)]

    def _cache_structs(self, kv_cache: Tensor) -> ctypes.Array[CacheStruct]:
        """Made once for a pool; another one may lie where it was."""
        pool = (kv_cache.data_ptr(), kv_cache.shape)
        if self._caches is None or self._caches[0] != pool:
            made = (CacheStruct * len(kv_cache))(*(CacheStruct(pointer(c[0]), pointer(c[1])) for c in kv_cache))
            self._caches = (pool, made)
        return self._caches[1]


def struct_of(linear: Linear) -> LinearStruct:
    """Pointers into a packed layer, which must outlive it."""
    return linear_struct(linear.weight, linear.scales, linear.bias, linear.activation == "gelu")
