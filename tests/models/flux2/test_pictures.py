"""Pictures that a FLUX.2 request brings: resized and cropped as diffusers does, and what is no reference is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image
from support.flux2 import picture
from torch import Tensor

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.models.flux2.pictures import check_pictures, cropped, soft_mask, stretched, whole_size
from vllm_omni.params import DiffusionParams

SIZES = [(64, 64), (79, 97), (512, 65), (1024, 1024), (1025, 1024), (999, 1777), (3000, 400)]


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))


def unscaled(processed: Tensor) -> Tensor:
    """[1, 3, H, W] in -1 to 1 -> uint8 [H, W, 3]"""
    return ((processed[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_references_are_resized_and_cropped_as_the_reference_does(size: tuple[int, int]) -> None:
    image, processor = picture(*size, seed=0), Flux2ImageProcessor(vae_scale_factor=16)
    smaller = image if image.width * image.height <= 1024 * 1024 else processor._resize_to_target_area(image)
    width, height = (side // 16 * 16 for side in smaller.size)
    expected = unscaled(processor.preprocess(smaller, height=height, width=width, resize_mode="crop"))
    got = cropped(pixels(image), 16)
    assert whole_size(size, 16) == got.shape[:2] == (height, width)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("size", SIZES)
def test_masked_pictures_are_resized_as_the_reference_does(size: tuple[int, int]) -> None:
    image, processor = picture(*size, seed=0), Flux2ImageProcessor(vae_scale_factor=16)
    mask = Image.fromarray(np.array(picture(*size, seed=1))[..., 0])
    masks = Flux2ImageProcessor(
        vae_scale_factor=16, do_normalize=False, do_binarize=True, do_convert_rgb=False, do_convert_grayscale=True
    )
    smaller = image if image.width * image.height <= 1024 * 1024 else processor._resize_to_target_area(image)
    width, height = (side // 16 * 16 for side in smaller.size)
    assert torch.equal(stretched(pixels(image), 16), unscaled(processor.preprocess(smaller, height, width)))
    binary = masks.preprocess(mask, height=height, width=width)
    expected = torch.nn.functional.interpolate(binary, (height // 16, width // 16), mode="bilinear")[0, 0]
    assert torch.equal(soft_mask(pixels(mask), (height, width), (height // 16, width // 16)), expected)


@pytest.mark.parametrize(
    "given, says",
    [
        ({"image": []}, "image: got 0 pictures, expected 1 to 4"),
        ({"image": [picture(64, 64, 0)] * 5}, "image: got 5 pictures, expected 1 to 4"),
        ({"image": picture(64, 63, 0)}, "image: got 63x64 pixels, expected at least 64 a side"),
        ({"image": [picture(64, 64, 0), picture(1, 1, 0)]}, r"image\[1\]: got 1x1 pixels, expected at least 64"),
        ({"image": picture(64, 513, 0)}, "image: got 513x64 pixels, expected one side at most 8 times the other"),
        ({"image": 7}, "image: got int"),
        ({"image": picture(2000, 1100, 0)}, "image: got 1100x2000 pixels, expected at most 2000000"),
        ({"mask": picture(64, 64, 0)}, "mask: got one without an image"),
        ({"image": picture(64, 64, 0), "mask": picture(64, 80, 0)}, "mask: got 80x64 pixels, expected 64x64"),
        ({"image": picture(64, 64, 0), "strength": 0.5}, "strength: got one without a mask"),
    ],
)
def test_what_is_no_reference_is_refused_before_it_is_decoded(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        check_pictures(DiffusionParams(**given), LimitsConfig(max_image_pixels=2_000_000))
