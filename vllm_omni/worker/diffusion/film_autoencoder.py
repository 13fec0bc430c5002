"""diffusers' autoencoders of films (Wan's, and Qwen-Image's, which is one of them), with the package's kernels in the
place of what takes their time on a CPU. Frames lie one after the other in memory, the channels of a pixel side by side.

Legend: C channels, f frames, h, w pixels of a side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_omni.layers.convolution import Convolution, PixelProduct
from vllm_omni.layers.native.library import kernels_for
from vllm_omni.layers.picture_norms import PixelNorm
from vllm_omni.worker.diffusion.picture_autoencoder import replace

NORMS = ("norm1", "norm2", "norm_out")  # which the activation of their module follows
CAUSAL_PADDING = (1, 1, 1, 1, 2, 0)  # of columns, rows and frames, before and behind


def use_kernels(module: nn.Module) -> None:
    """Puts the package's parts in the place of diffusers' and torch's in a loaded autoencoder, where it has them."""
    for part in module.modules():
        _use_norms(part)
    replace(module, _found)


class CausalConvolution(nn.Module):
    """A convolution of 3 frames, the last of them that which has a result; before the first are zeros."""

    def __init__(self, convolution: Convolution) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """x: [1, C, f, h, w] -> [1, C', f, h, w]. cache_x: [1, C, up to 2, h, w], the frames before it."""
        (film,) = x  # one at a time, as it is decoded
        kept = [] if cache_x is None else list(cache_x[0].unbind(1))
        before = [torch.zeros_like(film[:, 0])] * (2 - len(kept)) + kept
        frames = torch.stack([frame.movedim(0, -1) for frame in (*before, *film.unbind(1))])
        found: Tensor = self.convolution(frames.movedim(-1, 1))
        return found.transpose(0, 1)[None]


def _found(part: nn.Module) -> nn.Module | None:
    if isinstance(part, nn.Conv3d):
        convolution = Convolution.of_weight(part.weight, part.bias) if _is_causal(part) else None
        return None if convolution is None else CausalConvolution(convolution)
    if isinstance(part, nn.Sequential):
        return _doubling(part)
    return Convolution.find(part) or PixelProduct.find(part)


def _is_causal(part: nn.Conv3d) -> bool:
    """Whether it reads 3 x 3 pixels of a frame and of the two before it."""
    is_plain = part.kernel_size == (3, 3, 3) and part.stride == part.dilation == (1, 1, 1) and part.groups == 1
    return is_plain and getattr(part, "_padding", None) == CAUSAL_PADDING


def _doubling(part: nn.Sequential) -> nn.Module | None:
    """Of a picture that is doubled and read by a convolution, both in one; None of another sequence."""
    if len(part) != 2 or not isinstance(part[0], nn.Upsample) or part[0].scale_factor != (2.0, 2.0):
        return None
    return Convolution.find(part[1], doubled=True) if part[0].mode in ("nearest", "nearest-exact") else None


def _use_norms(part: nn.Module) -> None:
    """Of a module whose norms are each followed by its SiLU."""
    names = [name for name in NORMS if isinstance(getattr(part, name, None), nn.Module)]
    if not names or type(getattr(part, "nonlinearity", None)) is not nn.SiLU:
        return
    weights = [_weight(getattr(part, name)) for name in names]
    found = [PixelNorm(weight, activated=True) for weight in weights if weight is not None]
    if len(found) == len(names):
        for name, norm in zip(names, found, strict=True):
            setattr(part, name, norm)
        part.nonlinearity = nn.Identity()


def _weight(norm: nn.Module) -> Tensor | None:
    """[C], of a norm over the channels that has nothing else; None of another, or where no kernels compute it."""
    gamma, bias = getattr(norm, "gamma", None), getattr(norm, "bias", None)
    if not isinstance(gamma, Tensor) or not getattr(norm, "channel_first", False) or isinstance(bias, Tensor):
        return None
    return None if kernels_for(gamma) is None else gamma.detach().flatten()
