"""Previews: when a running sample is shown, what its clean latents are judged to be, and a cheap picture of them.

One implementation for all models that denoise a VAE's latents along a flow. Knows no model and no request.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_omni.worker.diffusion.preview_map import PreviewMap

MAX_DECODED_SIDE = 32  # latents along each side that are decoded where there is no map


class Previewer:
    """Pictures of latents by a map or, without one, by the VAE on latents that are made smaller.

    decode: [C, h, w] -> [3, H, W] float in 0 to 1, the VAE itself. scale: pixels of a latent, along each side.
    """

    def __init__(
        self, preview_map: PreviewMap | None, decode: Callable[[Tensor], Tensor], scale: int, device: torch.device
    ) -> None:
        self._scale = scale
        self._decode = decode
        self._map = None if preview_map is None else Colours(preview_map, device)

    def __call__(self, latents: Tensor) -> Tensor:
        """[C, h, w] float32 -> [H, W, 3] uint8, of the finished picture's size."""
        latents = latents.nan_to_num()
        size = [side * self._scale for side in latents.shape[1:]]
        colours = self._decode(smaller(latents)) if self._map is None else self._map(latents)
        return to_pixels(F.interpolate(colours[None], size, mode="bicubic", align_corners=False)[0])


class Colours:
    """A PreviewMap on a device."""

    def __init__(self, preview_map: PreviewMap, device: torch.device) -> None:
        self._pairs = torch.triu_indices(len(preview_map.factors), len(preview_map.factors), device=device)
        self._has_products = bool(preview_map.products)
        self._factors = torch.tensor([*preview_map.factors, *preview_map.products], device=device).T.contiguous()
        self._bias = torch.tensor(preview_map.bias, device=device)[:, None]

    def __call__(self, latents: Tensor) -> Tensor:
        """[C, h, w] float32 -> [3, h, w], 0 to 1 being what can be shown."""
        channels = latents.flatten(1)
        if self._has_products:
            first, second = self._pairs
            channels = torch.cat([channels, channels[first] * channels[second]])
        return (self._factors @ channels + self._bias).unflatten(1, latents.shape[1:])


def preview_steps(num_previews: int, num_steps: int) -> tuple[int, ...]:
    """After which steps a sample is shown: evenly spread, the first before half of them (where there are more than
    two), never after the last, whose latents are the picture. Fewer than asked for where there are not enough steps.
    """
    count = min(num_previews, num_steps - 1)
    return tuple(max(nth, -(-nth * num_steps // (count + 1)) - 1) for nth in range(1, count + 1))


def flow_estimate(sigmas: Tensor, step: int, latents: Tensor, velocity: Tensor) -> Tensor:
    """What the latents will be at the flow's end, going on straight from before this step. sigmas: of all steps, and
    of the end; velocity: change of the latents per sigma.
    """
    return latents + (sigmas[-1] - sigmas[step]) * velocity


def smaller(latents: Tensor) -> Tensor:
    """[C, h, w], averaged down so that no side is longer than MAX_DECODED_SIDE."""
    ratio = MAX_DECODED_SIDE / max(latents.shape[1:])
    if ratio >= 1:
        return latents
    return F.interpolate(latents[None], [max(1, round(side * ratio)) for side in latents.shape[1:]], mode="area")[0]


def to_pixels(colours: Tensor) -> Tensor:
    """[3, H, W] float, 0 to 1 being what can be shown -> [H, W, 3] uint8."""
    return (colours.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
