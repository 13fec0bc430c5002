"""Convolutions with pictures whose channels lie last in memory, by kernels of a CPU: those of 3 x 3 make 16 products of
what are 36, in float32 36 of what are 144, or 9 of 36 where the picture is doubled first. Knows no model.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.native import convolution as native
from vllm_omni.layers.native.library import Kernels, kernels_for
from vllm_omni.layers.native.packed import NativePacking


class Convolution(nn.Module):
    """A convolution as the kernels compute it: packed, and with the sum that may follow.

    In float32 it is torch's to rounding, and to six times that where tiles are wide (3e-6 at 256 channels). In bfloat16
    neighbours are added and rounded before they are multiplied: it is 3e-3 from the exact result, where torch's, which
    rounds the result alone, is 1.7e-3.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, functions: Kernels, *, doubled: bool = False) -> None:
        """weight: [C', C, f, 3, 3], of f frames. doubled: every pixel is read as two by two."""
        super().__init__()
        self._functions, self._tile = functions, native.Tile.of(weight.shape, weight.dtype, doubled=doubled)
        self.packed = nn.Parameter(native.pack(functions, weight.detach(), self._tile), requires_grad=False)
        self.bias = bias

    @classmethod
    def find(cls, plain: nn.Module, *, doubled: bool = False) -> Convolution | None:
        """In place of one of torch's; None where no kernels compute it."""
        if type(plain) is not nn.Conv2d or not _is_plain(plain):
            return None
        return cls.of_weight(plain.weight[:, :, None], plain.bias, doubled=doubled)

    @classmethod
    def of_weight(cls, weight: Tensor, bias: Tensor | None, *, doubled: bool = False) -> Convolution | None:
        """weight: [C', C, f, 3, 3]; None where no kernels compute it, or its gradient is asked for."""
        functions = kernels_for(weight) if native.fits(*weight.shape[:2]) and not weight.requires_grad else None
        return None if functions is None else cls(weight, bias, functions, doubled=doubled)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [R, C, h, w], with f - 1 frames before the first that has a result -> [R, C', h, w], or with both sides
        doubled. residual: what is added to it.
        """
        return native.convolve(self._functions, x, self.packed, self.bias, residual, self._tile)


class PixelProduct(nn.Module):
    """A convolution of 1 x 1: the channels of each pixel, multiplied with one packed weight."""

    def __init__(self, packing: NativePacking, weight: Tensor, bias: Tensor | None) -> None:
        """weight: [C', C]."""
        super().__init__()
        self._packing = packing
        self.weight = nn.Parameter(packing.pack(weight.clone()), requires_grad=False)
        self.bias = bias

    @classmethod
    def find(cls, plain: nn.Module) -> PixelProduct | None:
        """In place of one of torch's; None where no kernels compute it."""
        if type(plain) is not nn.Conv2d or plain.kernel_size != (1, 1) or plain.stride != (1, 1) or plain.groups != 1:
            return None
        return cls.of_weight(plain.weight[:, :, 0, 0], plain.bias) if plain.padding == (0, 0) else None

    @classmethod
    def of_weight(cls, weight: Tensor, bias: Tensor | None) -> PixelProduct | None:
        """weight: [C', C]; None where no kernels compute it, or its gradient is asked for."""
        packing = NativePacking.find(weight) if kernels_for(weight) is not None and not weight.requires_grad else None
        return None if packing is None else cls(packing, weight.detach(), bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [R, C, h, w] -> [R, C', h, w], its channels last in memory."""
        return self._packing.multiply(x.movedim(1, -1), self.weight, self.bias).movedim(-1, 1)


def convolve(x: Tensor, plain: nn.Conv2d, residual: Tensor | None = None, *, doubled: bool = False) -> Tensor:
    """What a Convolution is, in torch."""
    found: Tensor = plain(F.interpolate(x, scale_factor=2.0, mode="nearest") if doubled else x)
    return found if residual is None else residual + found


def _is_plain(plain: nn.Conv2d) -> bool:
    """Whether it is of 3 x 3 at every pixel, with as many zeros around as keep the size."""
    sizes = (plain.kernel_size, plain.stride, plain.padding, plain.dilation)
    return sizes == ((3, 3), (1, 1), (1, 1), (1, 1)) and plain.groups == 1 and plain.padding_mode == "zeros"
