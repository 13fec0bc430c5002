"""Causal convolutions that carry what they have seen, so that a stream convolved piece by piece is the whole.

Everything lies as [B, n, C], the channels last: there 1 x 1 convolutions and transposed ones are matrix products, and
oneDNN's convolutions are fastest.

Legend: B rows, n steps, C channels in, O channels out, k kernel, s stride.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.models.qwen3_tts.codec.state import Carrying, CodecState


class CausalConv(Carrying):
    """Step i reads i - (k - 1) dilation .. i; carries the steps that later ones read."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.dilation, self.kernel, self.channels = dilation, kernel, channels_in
        # published as [O, C, k]; in memory [O, k, C], which is conv2d's own layout for channels that come last
        self.weight = nn.Parameter(torch.empty(channels_out, kernel, channels_in).transpose(1, 2))
        self.bias = nn.Parameter(torch.empty(channels_out))

    @property
    def carried_shape(self) -> tuple[int, ...]:
        return ((self.kernel - 1) * self.dilation, self.channels)

    def forward(self, x: Tensor, state: CodecState) -> Tensor:
        """[B, n, C] -> [B, n, O]."""
        if self.kernel == 1:
            return F.linear(x, self.weight[:, :, 0], self.bias)
        x = torch.cat([state[self.key], x], dim=1)
        state[self.key] = x[:, -self.carried_shape[0] :]
        image = x.transpose(1, 2).unsqueeze(2)  # [B, C, 1, n], in memory [B, n, C]
        made = F.conv2d(image, self.weight.unsqueeze(2), self.bias, dilation=(1, self.dilation))
        return made.squeeze(2).transpose(1, 2)


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


class TransposedConv(Carrying):
    """Every step becomes s steps, and with k = 2 s it reaches into the s after these, which are carried.

    trims_start: a stream loses its first s steps.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int, *, overlaps: bool, trims_start: bool) -> None:
        super().__init__()
        self.stride, self.channels = stride, channels_out
        self.overlaps, self.trims_start = overlaps, trims_start and overlaps
        kernel = 2 * stride if overlaps else stride
        # published as [C, O, k]; in memory [k, O, C], the weight of a matrix product
        self.weight = nn.Parameter(torch.empty(kernel, channels_out, channels_in).permute(2, 1, 0))
        self.bias = nn.Parameter(torch.empty(channels_out))

    @property
    def carried_shape(self) -> tuple[int, ...]:
        return (self.stride if self.overlaps else 0, self.channels)

    def forward(self, x: Tensor, state: CodecState, *, is_first: bool) -> Tensor:
        """[B, n, C] -> [B, n s, O], of a beginning that is trimmed [B, (n - 1) s, O]."""
        num_rows, num_steps, _ = x.shape
        weight = self.weight.permute(2, 1, 0).flatten(0, 1)  # [k O, C], a view
        reached = F.linear(x, weight).view(num_rows, num_steps, -1, self.stride, self.channels)
        made = reached[:, :, 0]
        if self.overlaps:
            before = torch.cat([state[self.key][:, None], reached[:, :-1, 1]], dim=1)
            state[self.key] = reached[:, -1, 1]
            made = made + before
        made = (made + self.bias).flatten(1, 2)
        return made[:, self.stride :] if is_first and self.trims_start else made
