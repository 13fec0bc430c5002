"""A picture that a trajectory starts from, instead of from noise alone, and what a mask keeps of it.

For models that denoise an autoencoder's latents along a flow, from sigma 1 (noise) to 0. Formulas are those of
diffusers' image to image and inpainting pipelines. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.image_input import fitted, image_size
from vllm_omni.params import DiffusionParams

STRENGTH = 0.6  # of diffusers' image to image pipelines
MASKED_STRENGTH = 1.0  # of its inpainting pipelines
HALF = 128  # of a mask's 255: from here on it is drawn anew


@dataclass(frozen=True, slots=True)
class SourceImage:
    """What all outputs of a request share. Latents are scaled as the sampler has them."""

    pixel_size: tuple[int, int]  # height and width as it is encoded
    mean: Tensor  # [C, h, w] float32
    deviation: Tensor | None  # the same; None where the mean is taken and nothing drawn
    mask: Tensor | None  # [h, w] float32: 1 where the picture is drawn anew, 0 where it is kept

    def begin(self, generator: torch.Generator) -> StartedImage:
        """One output's own, drawn on the CPU."""
        latents = self.mean
        if self.deviation is not None:
            latents = latents + self.deviation * self._drawn(generator)
        return StartedImage(latents, self._drawn(generator), self.mask)

    def _drawn(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.mean.shape, generator=generator, dtype=torch.float32).to(self.mean.device)


@dataclass(frozen=True, slots=True)
class StartedImage:
    """The picture and the noise of one output."""

    latents: Tensor  # [C, h, w] float32
    noise: Tensor
    mask: Tensor | None

    def at(self, sigma: Tensor) -> Tensor:
        """The picture with as much noise as the sampler has there."""
        return sigma * self.noise + (1.0 - sigma) * self.latents

    def constrain(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """The latents at a sigma, with the picture's own where the mask keeps it."""
        return latents if self.mask is None else torch.lerp(self.at(sigma), latents, self.mask)


def check_source(params: DiffusionParams, num_steps: int, limits: LimitsConfig) -> tuple[int, int] | None:
    """(height, width) of the picture that a request starts from, None where it brings none; nothing is decoded.
    InvalidRequestError for one that cannot be, for a mask that does not fit it, and for a strength that leaves no step.
    """
    if params.image is None:
        for name in ("mask", "strength"):
            if getattr(params, name) is not None:
                raise InvalidRequestError(f"{name}: got one without an image; give the image, or leave it out")
        return None
    if isinstance(params.image, list | tuple):
        raise InvalidRequestError(f"image: got a list of {len(params.image)}, expected the one to start from")
    size = image_size(params.image, limits, "image")
    if params.mask is not None:
        height, width = image_size(params.mask, limits, "mask")
        if (height, width) != size:
            raise InvalidRequestError(
                f"mask: got {width}x{height} pixels, expected {size[1]}x{size[0]}, which the image has; resize it"
            )
    if first_step(params, num_steps) >= num_steps:
        raise InvalidRequestError(
            f"strength: got {strength(params):g}, which leaves none of {num_steps} steps; expected more than 0, or more"
            " steps"
        )
    return size


def strength(params: DiffusionParams) -> float:
    """How far the picture may be left."""
    default = STRENGTH if params.mask is None else MASKED_STRENGTH
    return default if params.strength is None else params.strength


def first_step(params: DiffusionParams, num_steps: int) -> int:
    """The first of these steps that is computed."""
    if params.image is None:
        return 0
    return int(max(num_steps - min(num_steps * strength(params), num_steps), 0))


def latent_mask(mask: Tensor, size: tuple[int, int], latents: Tensor) -> Tensor:
    """uint8 [height, width] -> float32 [h, w] of zeros and ones. size: of the picture as it is encoded into `latents`
    [C, h, w].
    """
    is_new = (fitted(mask, size) >= HALF).float()
    return F.interpolate(is_new[None, None], list(latents.shape[1:]), mode="nearest")[0, 0]
