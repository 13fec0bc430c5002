"""The experts of a mixture run by one call of the kernels. What they compute is `layers.moe`'s to say.

Legend: N tokens, D hidden size, E experts, k of them for each token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_omni.layers.linear import Linear
from vllm_omni.layers.native.decoder import struct_of
from vllm_omni.layers.native.library import Kernels, kernels, pointer, threads_for
from vllm_omni.layers.native.packed import NativePacking
from vllm_omni.layers.native.structures import ExpertStruct, MixtureShapeStruct


class NativeExperts:
    """Those of one mixture, whose weights are packed and stay where they are."""

    def __init__(self, experts: Sequence[tuple[Linear, Linear]], functions: Kernels) -> None:
        """experts: gate and up as one layer, and down."""
        gate_up, down = experts[0]
        self._kernels = functions
        self._dtype = gate_up.input_dtype
        self._experts = (ExpertStruct * len(experts))(*(ExpertStruct(*map(struct_of, pair)) for pair in experts))
        self._hidden, self._intermediate = down.out_features, down.in_features
        self._weights = gate_up.weight.numel() + down.weight.numel()

    @classmethod
    def find(cls, experts: Sequence[tuple[Linear, Linear]]) -> NativeExperts | None:
        """None where the kernels do not take such experts, or their weights are packed in another way, or in int8."""
        for pair in experts:
            if not all(isinstance(linear.packing, NativePacking) and linear.scales is None for linear in pair):
                return None
        functions = kernels(experts[0][0].input_dtype)
        return None if functions is None else cls(experts, functions)

    def mix(self, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """states: [N, D]; chosen: [N, k] int64, ascending in a row; weights: [N, k], the model's dtype -> [N, D]."""
        assert states.dtype == weights.dtype == self._dtype
        states, chosen, weights = states.contiguous(), chosen.contiguous(), weights.contiguous()
        out = torch.empty_like(states)
        if not len(states):
            return out
        shape = MixtureShapeStruct(
            *chosen.shape[:1], len(self._experts), chosen.shape[1], self._hidden, self._intermediate
        )
        threads = threads_for(chosen.numel() * self._weights)
        self._kernels.mix_experts(
            self._experts, shape, pointer(states), pointer(chosen), pointer(weights), out.data_ptr(), threads
        )
        return out
