"""Causal convolutions that carry what they have seen, so that a stream convolved piece by piece is the whole.

Everything lies as [B, n, C], the channels last: there every convolution is one matrix product over windows of steps,
and products of packed weights are faster than the library's convolutions for the few steps of a frame.

Legend: B rows, n steps, C channels in, O channels out, k kernel, s stride.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.linear import PackedLayer
from vllm_omni.models.qwen3_tts.codec.state import Carrying, CodecState

MAX_WINDOW_NUMBERS = 2**20  # of the windows that are laid out at once: what caches hold


class ProductLayer(PackedLayer):
    """A convolution that is computed as a product. Published weights have three dimensions; they lie in memory as the
    matrix that `pack` makes of them.
    """

    scales = None
    can_quantize = False
    bias: nn.Parameter
    order: ClassVar[tuple[int, int, int]]  # of the published dimensions in memory; the first ones join to outputs
    num_outputs: ClassVar[int]  # how many of them do

    def matrix(self) -> Tensor:
        """[outputs, inputs], a view while the weight is as published."""
        weight = self.weight
        if weight.dim() == 2:
            return weight
        return weight.permute(self.order).flatten(self.num_outputs).flatten(0, self.num_outputs - 1)

    def pack(self) -> None:
        self.weight = nn.Parameter(self.matrix().detach(), requires_grad=False)
        super().pack()

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.packing is None:
            return F.linear(x, self.matrix(), bias)
        return self.packing.multiply(x, self.weight, bias)


class CausalConv(ProductLayer, Carrying):
    """Step i reads i - (k - 1) dilation .. i; carries the steps that later ones read."""

    order, num_outputs = (0, 2, 1), 1

    def __init__(self, channels_in: int, channels_out: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.dilation, self.kernel, self.channels = dilation, kernel, channels_in
        self.weight = nn.Parameter(torch.empty(channels_out, kernel, channels_in).transpose(1, 2))
        self.bias = nn.Parameter(torch.empty(channels_out))

    @property
    def carried_shape(self) -> tuple[int, ...]:
        return ((self.kernel - 1) * self.dilation, self.channels)

    def forward(self, x: Tensor, state: CodecState) -> Tensor:
        """[B, n, C] -> [B, n, O]."""
        if self.kernel == 1:
            return self.multiply(x, self.bias)
        num_rows, num_steps, _ = x.shape
        x = torch.cat([state[self.key], x], dim=1)
        state[self.key] = x[:, -self.carried_shape[0] :]
        row, step, channel = x.stride()
        windows = x.as_strided(
            (num_rows, num_steps, self.kernel, self.channels), (row, step, self.dilation * step, channel)
        )
        size = max(1, MAX_WINDOW_NUMBERS // (num_rows * self.kernel * self.channels))
        made = [self.multiply(part.flatten(2), self.bias) for part in windows.split(size, dim=1)]
        return made[0] if len(made) == 1 else torch.cat(made, dim=1)


class DepthwiseConv(Carrying):
    """A causal convolution of every channel by itself."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.kernel, self.channels = kernel, channels
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.empty(channels))

    @property
    def carried_shape(self) -> tuple[int, ...]:
        return (self.kernel - 1, self.channels)

    def forward(self, x: Tensor, state: CodecState) -> Tensor:
        """[B, n, C] -> [B, n, C]."""
        x = torch.cat([state[self.key], x], dim=1)
        state[self.key] = x[:, 1 - self.kernel :]
        windows = x.unfold(1, self.kernel, 1)  # [B, n, C, k]
        return (windows * self.weight[:, 0]).sum(dim=-1) + self.bias


class TransposedConv(ProductLayer, Carrying):
    """Every step becomes s steps, and with k = 2 s it reaches into the s after these, which are carried.

    trims_start: a stream loses its first s steps.
    """

    order, num_outputs = (2, 1, 0), 2

    def __init__(self, channels_in: int, channels_out: int, stride: int, *, overlaps: bool, trims_start: bool) -> None:
        super().__init__()
        self.stride, self.channels = stride, channels_out
        self.overlaps, self.trims_start = overlaps, trims_start and overlaps
        kernel = 2 * stride if overlaps else stride
        self.weight = nn.Parameter(torch.empty(kernel, channels_out, channels_in).permute(2, 1, 0))
        self.bias = nn.Parameter(torch.empty(channels_out))

    @property
    def carried_shape(self) -> tuple[int, ...]:
        return (self.stride if self.overlaps else 0, self.channels)

    def forward(self, x: Tensor, state: CodecState, *, is_first: bool) -> Tensor:
        """[B, n, C] -> [B, n s, O], of a beginning that is trimmed [B, (n - 1) s, O]."""
        num_rows, num_steps, _ = x.shape
        reached = self.multiply(x, None).view(num_rows, num_steps, -1, self.stride, self.channels)
        made = reached[:, :, 0]
        if self.overlaps:
            before = torch.cat([state[self.key][:, None], reached[:, :-1, 1]], dim=1)
            state[self.key] = reached[:, -1, 1]
            made = made + before
        made = (made + self.bias).flatten(1, 2)
        return made[:, self.stride :] if is_first and self.trims_start else made
