"""The layers of a decoder run by one call of the kernels. What they compute is `layers.decoder`'s to say.

Legend: N tokens of a step, D hidden size, d head size.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_omni.layers.attention.base import AttentionMetadata
from vllm_omni.layers.native.attention import fits, step_struct
from vllm_omni.layers.native.library import Kernels, kernels, pointer
from vllm_omni.layers.native.packed import NativePacking
from vllm_omni.layers.native.structures import CacheStruct, HeadsStruct, LayerStruct, LinearStruct, ShapeStruct

if TYPE_CHECKING:
    from vllm_omni.layers.decoder import Decoder, DecoderLayer
    from vllm_omni.layers.linear import Linear


class NativeLayers:
    """Those of one decoder, whose weights are packed and stay where they are."""

    def __init__(self, decoder: Decoder, functions: Kernels, dtype: torch.dtype) -> None:
        config = decoder.config
        self._kernels = functions
        self._dtype = dtype
        self._layers = (LayerStruct * len(decoder.layers))(*map(_layer, decoder.layers))
        heads = HeadsStruct(config.num_heads, config.num_kv_heads, config.head_dim, 0, config.head_dim**-0.5)
        width = decoder.layers[0].mlp.down_proj.in_features
        self._shape = ShapeStruct(config.hidden_size, width, heads, config.rms_norm_eps)
        self._caches: tuple[int, ctypes.Array[CacheStruct]] = (0, (CacheStruct * 0)())

    @classmethod
    def find(cls, decoder: Decoder) -> NativeLayers | None:
        """None where the kernels do not run such a decoder, or its weights are packed in another way."""
        from vllm_omni.layers.decoder import DecoderMLP

        config = decoder.config
        if not config.num_layers or not fits(config.num_heads, config.num_kv_heads, config.head_dim):
            return None
        if not all(type(layer.mlp) is DecoderMLP and _is_packed(layer) for layer in decoder.layers):
            return None
        dtype = decoder.norm.weight.dtype
        functions = kernels(dtype)
        return None if functions is None else cls(decoder, functions, dtype)

    def run(
        self, first: int, last: int, states: Tensor, cos: Tensor, sin: Tensor, metadata: AttentionMetadata, kv_cache: Tensor
    ) -> Tensor:
        """The layers [first, last) from states [N, D], the model's dtype; cos, sin: [N, 1, d]; kv_cache:
        [num_layers, 2, blocks, block_size, kv heads, d] -> [N, D].
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
            states.data_ptr(),
            torch.get_num_threads(),
        )
        return states

    def _cache_structs(self, kv_cache: Tensor) -> ctypes.Array[CacheStruct]:
        if self._caches[0] != kv_cache.data_ptr():
            made = (CacheStruct * len(kv_cache))(*(CacheStruct(pointer(c[0]), pointer(c[1])) for c in kv_cache))
            self._caches = (kv_cache.data_ptr(), made)
        return self._caches[1]


def _linears(layer: DecoderLayer) -> tuple[Linear, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj


def _is_packed(layer: DecoderLayer) -> bool:
    return all(isinstance(linear.packing, NativePacking) for linear in _linears(layer))


def _layer(layer: DecoderLayer) -> LayerStruct:
    attention = layer.self_attn
    norms = (layer.input_layernorm, attention.q_norm, attention.k_norm, layer.post_attention_layernorm)
    return LayerStruct(
        *(None if norm is None else pointer(norm.weight) for norm in norms),
        *(
            LinearStruct(pointer(linear.weight), pointer(linear.bias), linear.out_features, linear.in_features)
            for linear in _linears(layer)
        ),
        attention.window or 0,
    )
