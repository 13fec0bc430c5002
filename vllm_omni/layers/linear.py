"""Matrix multiplication with weights, several published projections as one, and embeddings that are also a head. Knows
no model and no checkpoint file; how a weight lies in memory is `packing`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from vllm_omni.layers import float8, halves
from vllm_omni.layers.lora import acting
from vllm_omni.layers.modulation import gelu, swiglu
from vllm_omni.layers.native.packed import PANEL, Activation, NativePacking, can_gate
from vllm_omni.layers.packing import (
    Packing,
    RowPacking,
    find_packing,
    find_quantized_packing,
    linear,
)
from vllm_omni.layers.quantization import fits, quantize_weight
from vllm_omni.layers.shard import WHOLE, Cut, Shard

ACTIVATIONS = {"gelu": gelu, "swiglu": swiglu}
# By the key `quantization`: what weights are held in, and which shapes may be
NUMBERS = {"int8": torch.int8, "fp8": float8.DTYPE, "bfloat16": halves.HELD}
FITS = {"int8": fits, "fp8": float8.fits, "bfloat16": halves.fits}


class PackedLayer(nn.Module):
    """What is common to layers whose weight [out, in] is packed for inference, and may be held in other numbers than it
    multiplies: in int8 or float8, or in bfloat16 beside float32.
    """

    weight: Tensor
    scales: Tensor | None  # [out] float32, of a weight in int8 or float8
    activations: torch.dtype | None = None  # that are multiplied, where the weight is held in something else
    packing: Packing | None = None
    can_quantize: bool  # whether what it computes stands 8 bits
    is_streamed: bool = False  # whether its weight comes and goes, and is multiplied where it does not lie now

    @property
    def input_dtype(self) -> torch.dtype:
        return self.weight.dtype if self.activations is None else self.activations

    def takes(self, quantization: str) -> bool:
        """Whether the weight may be held so: a key of NUMBERS."""
        return self.can_quantize and FITS[quantization](*self.weight.shape)

    def quantize(self, quantization: str) -> None:
        """The weight will be held in such numbers. On the meta device, before there are any in it."""
        self.activations = self.weight.dtype  # that it multiplies
        shape, device = self.weight.shape, self.weight.device
        empty = torch.empty(shape, dtype=NUMBERS[quantization], device=device)
        self.weight = nn.Parameter(empty, requires_grad=False)
        if empty.itemsize == 1:
            self.scales = torch.empty(shape[0], dtype=torch.float32, device=device)

    def fill(self, rows: slice, published: Tensor, scales: Tensor | None) -> None:
        """Puts published rows of the weight in their place; scales: of those that are numbers of its 8 bits already."""
        if self.scales is not None:
            if scales is None:
                quantize = quantize_weight if self.weight.dtype == torch.int8 else float8.quantize_float8
                published, scales = quantize(published.to(self.weight.device))
            self.scales[rows].copy_(scales)
        self.weight.data[rows].copy_(published)

    def pack(self) -> None:
        """Lays the weight out as it is multiplied, where that helps; the published layout is gone."""
        if self.packing is None:
            weight = self.weight.detach()
            if self.activations is not None:
                self.packing = find_quantized_packing(weight, self.scales, self.activations)
            elif not self.is_streamed:
                self.packing = self._find_packing(weight)
            if self.packing is not None:
                self.weight = nn.Parameter(self.packing.pack(weight), requires_grad=False)

    def cut(self, kind: str, rows: slice | None) -> Cut | None:
        """Which part of a published tensor these rows (None: all) of the weight or bias are; None: the whole of it."""
        return None

    def _find_packing(self, weight: Tensor) -> Packing | None:
        """For one that is not quantised."""
        return find_packing(weight)


class Linear(nn.Linear, PackedLayer):
    """A linear layer; until it is packed it is as torch's own. Adapters of the pass add to its product."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        can_quantize: bool = False,
        activation: Activation | None = None,
    ) -> None:
        """can_quantize: so for projections within blocks; embedders, modulation and what comes last lose too much.
        activation: that follows, on a CPU before the product is written to memory; SwiGLU makes one of two outputs.
        """
        super().__init__(in_features, out_features, bias=bias)
        self.can_quantize, self.activation = can_quantize, activation
        self.register_buffer("scales", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        packing, adapters = self.packing, acting()
        is_fit = self.activation != "swiglu" or can_gate(self.out_features)
        if adapters is None and isinstance(packing, NativePacking) and is_fit:
            return packing.multiply(x, self.weight, self.bias, self.activation)
        product = super().forward(x) if packing is None else packing.multiply(x, self.weight, self.bias)
        if adapters is not None:
            product = adapters.add(self, x, product)
        return product if self.activation is None else ACTIVATIONS[self.activation](product)


class RowLinear(Linear):
    """A linear layer whose inputs are shared out: the products of all ranks are summed, then the bias is added."""

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int,
        bias: bool = True,
        *,
        can_quantize: bool = False,
        shard: Shard = WHOLE,
        is_summed: bool = True,
    ) -> None:
        """in_features: whole widths; several where each of the inputs that stand beside each other is shared out.
        is_summed: whether the ranks' products are added here; else whoever calls it does that, and there is no bias.
        """
        assert is_summed or not bias
        segments = (in_features,) if isinstance(in_features, int) else tuple(in_features)
        super().__init__(sum(map(shard.part, segments)), out_features, bias, can_quantize=can_quantize)
        self.segments = segments
        self.shard = shard
        self.is_summed = is_summed

    def forward(self, x: Tensor) -> Tensor:
        if self.shard.is_whole or not self.is_summed:
            return super().forward(x)
        if self.packing is None:
            product = self.shard.sum(nn.functional.linear(x, self.weight))
        else:
            product = self.shard.sum(self.packing.multiply(x, self.weight, None))
        return product if self.bias is None else product + self.bias

    def cut(self, kind: str, rows: slice | None) -> Cut | None:
        is_whole = self.shard.is_whole or kind == "bias"
        return None if is_whole else Cut(self.shard, 1, self.segments)


class Embedding(nn.Embedding, PackedLayer):
    """Embeddings, which may be the weight of the head, too: then they are packed and quantised as a Linear is."""

    packing: RowPacking | None = None

    def __init__(self, num_embeddings: int, embedding_dim: int, *, is_head: bool) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.is_head = is_head
        self.can_quantize = is_head
        self.register_buffer("scales", None, persistent=False)

    def takes(self, quantization: str) -> bool:
        """Those that are no head are only looked up, which loses nothing of bfloat16."""
        return super().takes(quantization) or (quantization == "bfloat16" and not self.is_head)

    def reset_parameters(self) -> None:
        """Where there is no memory yet nothing is drawn: torch would import its compiler for that, a second or two."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, token_ids: Tensor) -> Tensor:
        return super().forward(token_ids) if self.packing is None else self.packing.rows(self.weight, token_ids)

    def compute_logits(self, states: Tensor) -> Tensor:
        """states: [R, D] -> [R, V], of the embeddings of a head."""
        assert self.is_head, "these embeddings are no head"
        if self.packing is None:
            return linear(states, self.weight)
        return self.packing.multiply(states, self.weight, None)

    def _find_packing(self, weight: Tensor) -> Packing | None:
        """Only a layout whose rows can still be read: oneDNN's would need a copy."""
        return NativePacking.find(weight) if self.is_head else None


class MergedLinear(Linear):
    """Projections of one input, stacked on the output axis: `parts` maps their published names to their widths, in
    order. Of each a rank holds its share.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        bias: bool = False,
        *,
        can_quantize: bool = False,
        activation: Activation | None = None,
        shard: Shard = WHOLE,
    ) -> None:
        """parts: whole widths."""
        self.parts = {name: shard.part(width) for name, width in parts.items()}  # of this rank
        width = sum(self.parts.values())
        super().__init__(in_features, width, bias=bias, can_quantize=can_quantize, activation=activation)
        self.shard = shard

    def rows(self, part: str) -> slice:
        """The rows of the weight (and bias) that one published projection fills."""
        ends = dict(zip(self.parts, accumulate(self.parts.values()), strict=True))
        return slice(ends[part] - self.parts[part], ends[part])

    def cut(self, kind: str, rows: slice | None) -> Cut | None:
        if self.shard.is_whole:
            return None
        widths = self.parts.values() if rows is None else (rows.stop - rows.start,)
        return Cut(self.shard, 0, tuple(width * self.shard.size for width in widths))

    def project_beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of projections the last two of which are a gate and what it gates: x: [N, in_features] -> the others
        [N, widths], contiguous, and silu(gate) * gated.
        """
        *others, gate, gated = self.parts.values()
        width, packing = sum(others), self.packing
        is_in_panels = not width % PANEL and can_gate(gate + gated)
        if acting() is None and isinstance(packing, NativePacking) and is_in_panels:
            plain = packing.multiply(x, self.weight, self.bias, outputs=slice(width))
            return plain, packing.multiply(x, self.weight, self.bias, "swiglu", slice(width, None))
        plain, gate_up = self(x).split([width, gate + gated], dim=-1)
        return plain.contiguous(), swiglu(gate_up)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: [N, in_features] -> one view [N, width] per part."""
        return self(x).split(list(self.parts.values()), dim=-1)


def pack_linears(module: nn.Module) -> None:
    """Packs every layer of this file in a module whose weights are loaded and will not change."""
    for part in module.modules():
        if isinstance(part, PackedLayer):
            part.pack()


def quantize_linears(module: nn.Module, quantization: str = "int8") -> None:
    """Every layer of this file that can will hold its weight so. On the meta device, the dtype chosen."""
    for part in module.modules():
        if isinstance(part, PackedLayer) and part.takes(quantization):
            part.quantize(quantization)
