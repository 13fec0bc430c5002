"""The pictures that a request brings: references, of any sizes, or one with a mask that is drawn anew in part, which
then is the first reference. How they are checked, resized and cropped is as in diffusers' pipelines of FLUX.2 [klein].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.image_input import fitted, image_size
from vllm_omni.params import DiffusionParams

MAX_PICTURES = 4
MAX_AREA = 1024 * 1024  # pixels; what is larger is made smaller
MIN_SIDE = 64
MAX_ASPECT = 8
STRENGTH = 0.8  # of what a mask covers
HALF = 128  # of a mask's 255: from here on it is drawn anew

Size = tuple[int, int]  # height, width in pixels


def pictures_of(params: DiffusionParams) -> list[object]:
    """None, one or several."""
    if params.image is None:
        return []
    return list(params.image) if isinstance(params.image, list | tuple) else [params.image]


def check_pictures(params: DiffusionParams, limits: LimitsConfig) -> list[Size]:
    """Their sizes, of which headers alone are read; InvalidRequestError for what cannot be a reference."""
    pictures = pictures_of(params)
    if params.image is not None and not 1 <= len(pictures) <= MAX_PICTURES:
        raise InvalidRequestError(f"image: got {len(pictures)} pictures, expected 1 to {MAX_PICTURES}")
    sizes = []
    for index, picture in enumerate(pictures):
        name = "image" if len(pictures) == 1 else f"image[{index}]"
        height, width = image_size(picture, limits, name)
        if min(height, width) < MIN_SIDE:
            raise InvalidRequestError(f"{name}: got {width}x{height} pixels, expected at least {MIN_SIDE} a side")
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise InvalidRequestError(
                f"{name}: got {width}x{height} pixels, expected one side at most {MAX_ASPECT} times the other; crop it"
            )
        sizes.append((height, width))
    _check_mask(params, sizes, limits)
    return sizes


def _check_mask(params: DiffusionParams, sizes: list[Size], limits: LimitsConfig) -> None:
    if params.mask is None:
        if params.strength is not None:
            raise InvalidRequestError("strength: got one without a mask, with which alone it is read; leave it out")
        return
    if not sizes:
        raise InvalidRequestError("mask: got one without an image; give the image that it is of, or leave it out")
    size = image_size(params.mask, limits, "mask")
    if size != sizes[0]:
        raise InvalidRequestError(
            f"mask: got {size[1]}x{size[0]} pixels, expected {sizes[0][1]}x{sizes[0][0]}, as the image has; resize it"
        )


def scaled_size(size: Size) -> Size:
    """Made smaller where it is too large."""
    height, width = size
    if height * width <= MAX_AREA:
        return size
    scale = math.sqrt(MAX_AREA / (width * height))
    return int(height * scale), int(width * scale)


def whole_size(size: Size, multiple: int) -> Size:
    """What is encoded of a picture of this size."""
    height, width = scaled_size(size)
    return height // multiple * multiple, width // multiple * multiple


def cropped(pixels: Tensor, multiple: int) -> Tensor:
    """uint8 [H, W, 3] -> the middle of it, as it is encoded as a reference."""
    size = (pixels.shape[0], pixels.shape[1])
    (full_height, full_width), (height, width) = scaled_size(size), whole_size(size, multiple)
    top, left = (full_height - height) // 2, (full_width - width) // 2
    return fitted(pixels, (full_height, full_width))[top : top + height, left : left + width]


def stretched(pixels: Tensor, multiple: int) -> Tensor:
    """uint8 [H, W, 3] -> all of it, as it is encoded with a mask."""
    size = (pixels.shape[0], pixels.shape[1])
    return fitted(fitted(pixels, scaled_size(size)), whole_size(size, multiple))


def soft_mask(mask: Tensor, size: Size, latent_size: tuple[int, int]) -> Tensor:
    """uint8 [height, width] -> float32 [h, w], 1 where it is drawn anew. size: of the picture as it is encoded."""
    is_new = (fitted(mask, size) >= HALF).to(torch.float32)
    return F.interpolate(is_new[None, None], latent_size, mode="bilinear")[0, 0]
