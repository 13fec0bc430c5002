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

from vllm_omni.layers.banded import attention
from vllm_omni.layers.convolution import Convolution, PixelProduct
from vllm_omni.layers.picture_norms import GroupNorm, use_group_norms
from vllm_omni.worker.diffusion.published_part import load_part

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention
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
        self.conv1, self.conv2 = first, second
        shortcut = block.conv_shortcut
        self.shortcut = shortcut if shortcut is None else PixelProduct.find(shortcut) or shortcut

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


class PictureAttention(nn.Module):
    """x + attention of every pixel to all, of the normed picture, by as many heads as diffusers' has."""

    def __init__(self, block: Attention, projections: PixelProduct, output: PixelProduct) -> None:
        super().__init__()
        self._num_heads = block.heads
        self.norm, self.projections, self.output = GroupNorm.of(block.group_norm), projections, output

    @classmethod
    def find(cls, block: Attention) -> PictureAttention | None:
        """In place of diffusers'; None where it is something else, or no kernels compute it."""
        others = (block.spatial_norm, block.norm_q, block.norm_k, block.norm_cross, block.added_kv_proj_dim)
        is_own = block.residual_connection and block.group_norm is not None and not block.is_cross_attention
        if any(other is not None for other in others) or not is_own or block.rescale_output_factor != 1:
            return None
        layers = (block.to_q, block.to_k, block.to_v)
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if len(biases) not in (0, len(layers)) or not block.scale_qk:
            return None
        weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat(biases) if biases else None
        projections = PixelProduct.of_weight(weight, bias)
        output = PixelProduct.of_weight(block.to_out[0].weight, block.to_out[0].bias)
        return None if projections is None or output is None else cls(block, projections, output)

    def forward(self, x: Tensor, temb: None = None) -> Tensor:
        """x: [R, C, h, w] -> the same. temb: the embedding of a time, which autoencoders have none of."""
        projected = self.projections(self.norm(x)).flatten(2).unflatten(1, (3, self._num_heads, -1))
        query, key, value = projected.transpose(-1, -2).unbind(1)  # [R, heads, h w, C / heads]
        attended = attention(query, key, value).transpose(-1, -2).flatten(1, 2).unflatten(2, x.shape[2:])
        found: Tensor = x + self.output(attended)
        return found


def use_kernels(module: nn.Module) -> None:
    """Puts the package's parts in the place of diffusers' and torch's in a loaded autoencoder, where it has them."""
    replace(module, _found)
    use_group_norms(module)
    for part in module.modules():  # the encoder and the decoder end with one that is activated
        norm = getattr(part, "conv_norm_out", None)
        if isinstance(norm, GroupNorm) and type(part.conv_act) is nn.SiLU:
            norm.activated, part.conv_act = True, nn.Identity()


def replace(module: nn.Module, find: Callable[[nn.Module], nn.Module | None]) -> None:
    """Each part within by what `find` has for it; where that is nothing, the parts of that one."""
    for name, child in list(module.named_children()):
        found = find(child)
        if found is None:
            replace(child, find)
        else:
            setattr(module, name, found)


def _found(part: nn.Module) -> nn.Module | None:
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    if isinstance(part, ResnetBlock2D):
        return ResidualBlock.find(part)
    if isinstance(part, Attention):
        return PictureAttention.find(part)
    return _doubling(part) if isinstance(part, Upsample2D) else Convolution.find(part) or PixelProduct.find(part)


def _doubling(block: Upsample2D) -> nn.Module | None:
    """The picture doubled, and a convolution, in one; None where it is something else, or no kernels compute it."""
    is_doubling = block.use_conv and block.interpolate and block.norm is None and block.name == "conv"
    return Convolution.find(block.conv, doubled=True) if is_doubling else None
