"""diffusers' autoencoders of pictures, with the package's kernels in the place of what takes their time on a CPU: nine
tenths are convolutions, and most of the rest is what stands between these.

Legend: R pictures, C channels, h, w pixels of a side.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vllm_omni.layers.convolution import Convolution
from vllm_omni.layers.picture_norms import GroupNorm, use_group_norms
from vllm_omni.worker.diffusion.published_part import load_part

if TYPE_CHECKING:
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D


def load_autoencoder(part: Any, folder: Path, device: torch.device, dtype: torch.dtype, variant: str | None) -> Any:
    """An instance of the diffusers class `part`, as `load_part` gives it, its channels last in memory."""
    vae = load_part(part, folder, dtype, variant).to(device=device, memory_format=torch.channels_last)
    use_kernels(vae)
    return vae


class ResidualBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))): each norm and its activation in one pass, and the sum where its
    second part is computed.
    """

    def __init__(self, block: ResnetBlock2D, first: Convolution, second: Convolution) -> None:
        super().__init__()
        self.norm1, self.norm2 = (GroupNorm.of(norm, activated=True) for norm in (block.norm1, block.norm2))
        self.conv1, self.conv2, self.shortcut = first, second, block.conv_shortcut

    @classmethod
    def find(cls, block: ResnetBlock2D) -> ResidualBlock | None:
        """In place of diffusers'; None where it is more than that, or no kernels compute it."""
        is_bare = block.time_emb_proj is None and block.time_embedding_norm != "scale_shift"
        is_same_size = block.upsample is None and block.downsample is None
        if not is_bare or not is_same_size or type(block.nonlinearity) is not nn.SiLU or block.output_scale_factor != 1:
            return None
        first, second = Convolution.find(block.conv1), Convolution.find(block.conv2)
        return None if first is None or second is None else cls(block, first, second)

    def forward(self, x: Tensor, temb: None = None) -> Tensor:
        """x: [R, C, h, w] -> [R, C', h, w]. temb: the embedding of a time, which autoencoders have none of."""
        hidden = self.norm2(self.conv1(self.norm1(x)))
        shortcut = x if self.shortcut is None else self.shortcut(x)  # last: until now it would lie beside the rest
        found: Tensor = self.conv2(hidden, shortcut)
        return found


class Doubling(nn.Module):
    """The picture doubled, and a convolution, in one."""

    def __init__(self, convolution: Convolution) -> None:
        super().__init__()
        self.convolution = convolution

    @classmethod
    def find(cls, block: Upsample2D) -> Doubling | None:
        """In place of diffusers'; None where it is something else, or no kernels compute it."""
        is_doubling = block.use_conv and block.interpolate and block.norm is None and block.name == "conv"
        convolution = Convolution.find(block.conv, doubled=True) if is_doubling else None
        return None if convolution is None else cls(convolution)

    def forward(self, x: Tensor, output_size: None = None) -> Tensor:
        """x: [R, C, h, w] -> [R, C', 2 h, 2 w]. output_size: another one, which autoencoders never ask for."""
        doubled: Tensor = self.convolution(x)
        return doubled


def use_kernels(module: nn.Module) -> None:
    """Puts the package's parts in the place of diffusers' and torch's in a loaded autoencoder, where it has them."""
    replace(module, _found)
    use_group_norms(module)


def replace(module: nn.Module, find: Callable[[nn.Module], nn.Module | None]) -> None:
    """Each part within by what `find` has for it; where that is nothing, the parts of that one."""
    for name, child in list(module.named_children()):
        found = find(child)
        if found is None:
            replace(child, find)
        else:
            setattr(module, name, found)


def _found(part: nn.Module) -> nn.Module | None:
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    if isinstance(part, ResnetBlock2D):
        return ResidualBlock.find(part)
    return Doubling.find(part) if isinstance(part, Upsample2D) else Convolution.find(part)
