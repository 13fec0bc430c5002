"""The layers of diffusers' AutoencoderOobleck as they run here: weight norms and factors computed once, and on the CPU
channels last in memory.

Legend: C channels of a layer, n frames or samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.snake import snake


class Snake(nn.Module):
    """x + sin(a x)^2 / b with both factors ready (diffusers' Snake1d exponentiates them at every call)."""

    frequency: Tensor
    amplitude: Tensor

    def __init__(self, alpha: Tensor, beta: Tensor) -> None:
        super().__init__()
        self.register_buffer("frequency", alpha.exp().flatten())
        self.register_buffer("amplitude", (beta.exp() + 1e-9).reciprocal().flatten())

    def forward(self, x: Tensor) -> Tensor:
        return snake(x, self.frequency, self.amplitude)


class ChannelsLastConv(nn.Module):
    """A Conv1d or a ConvTranspose1d whose output [1, C, n] lies in memory as [n, C]. The next layer takes it without a
    copy, and oneDNN is 2 to 8 times as fast as over [C, n].
    """

    def __init__(self, convolution: nn.Conv1d | nn.ConvTranspose1d) -> None:
        super().__init__()
        weight = convolution.weight.detach()[:, :, None].contiguous(memory_format=torch.channels_last)
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), convolution.bias
        self._convolve: Callable[..., Tensor] = F.conv2d if isinstance(convolution, nn.Conv1d) else F.conv_transpose2d
        stride, dilation = (1, *convolution.stride), (1, *convolution.dilation)
        self._sizes = {"stride": stride, "padding": (0, *convolution.padding), "dilation": dilation}

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x[:, :, None], self.weight, self.bias, **self._sizes)[:, :, 0]


def fold_constants(vae: nn.Module) -> nn.Module:
    """Weight norm recomputes a weight at every call, Snake1d its factors: both are done once, in place."""
    from diffusers.models.autoencoders.autoencoder_oobleck import Snake1d

    for module in vae.modules():
        if hasattr(module, "weight_g"):
            nn.utils.remove_weight_norm(module)
    for parent in list(vae.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Snake1d):
                setattr(parent, name, Snake(child.alpha.detach(), child.beta.detach()))
    return vae


def use_channels_last(vae: nn.Module) -> nn.Module:
    """Every convolution with its channels last in memory, in place; weight norms must be folded."""
    for parent in list(vae.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv1d | nn.ConvTranspose1d):
                setattr(parent, name, ChannelsLastConv(child))
    return vae
