"""What comes in as an image: from whatever a caller passes to pixels of a wanted size. Its header is read and measured
first; PIL's own guard against bombs stays on.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.source_files import open_source_file

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # PIL reads dozens, one of them by running a program
SOURCES = "a path, the bytes of a file, a PIL image or a numpy array uint8 [height, width, 3] or [height, width]"


def image_size(source: object, limits: LimitsConfig, name: str) -> tuple[int, int]:
    """(height, width) from the header, nothing decoded; InvalidRequestError for what is no image or too large."""
    if isinstance(source, np.ndarray):
        return _array_size(source, limits, name)
    with _opened(source, limits, name) as image:
        return image.height, image.width


def read_image(source: object, limits: LimitsConfig, name: str) -> Tensor:
    """uint8 [height, width, 3], upright, of an animation the first picture. source: see SOURCES. InvalidRequestError
    for anything that cannot be read or is beyond `limits`.
    """
    if isinstance(source, np.ndarray):
        _array_size(source, limits, name)
        pixels = source if source.ndim == 3 else np.repeat(source[..., None], 3, axis=2)
        return torch.from_numpy(np.ascontiguousarray(pixels).copy())
    with _opened(source, limits, name) as image:
        try:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        except Exception as error:  # the library raises whatever its parsers raise, with addresses in some texts
            raise InvalidRequestError(
                f"{name}: got an image that is damaged or truncated ({type(error).__name__}); save or copy it again"
            ) from None
        return torch.from_numpy(np.array(upright))


def resized(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """frame: uint8 [height, width, 3]. Returns uint8 [3, *size], bicubic."""
    image = frame.permute(2, 0, 1)
    if image.shape[1:] == size:
        return image.contiguous()
    return functional.interpolate(image[None], size, mode="bicubic", antialias=True)[0]


def check_pixels(height: int, width: int, limits: LimitsConfig, name: str) -> None:
    if height * width > limits.max_image_pixels:
        raise InvalidRequestError(
            f"{name}: got {width}x{height} pixels, expected at most {limits.max_image_pixels} in all "
            "(limits.max_image_pixels); make it smaller"
        )
    if height < 1 or width < 1:
        raise InvalidRequestError(f"{name}: got {width}x{height} pixels, expected at least one")


@contextmanager
def _opened(source: object, limits: LimitsConfig, name: str) -> Iterator[Image.Image]:
    """The image with its header read; a file that was opened for it is closed again."""
    if isinstance(source, Image.Image):
        check_pixels(source.height, source.width, limits, name)
        yield source
        return
    if isinstance(source, str | os.PathLike):
        file = open_source_file(source, name, "an image file")
    elif isinstance(source, bytes | bytearray | memoryview):
        file = io.BytesIO(source)
    else:
        raise InvalidRequestError(f"{name}: got {type(source).__name__}, expected {SOURCES}")
    with file:
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError:
            raise InvalidRequestError(
                f"{name}: got an image so large that it is taken for an attack, expected at most "
                f"{limits.max_image_pixels} pixels (limits.max_image_pixels); make it smaller"
            ) from None
        except UnidentifiedImageError:
            raise InvalidRequestError(
                f"{name}: got a file that is no whole image, expected {', '.join(FORMATS)}"
            ) from None
        except Exception as error:  # the library raises whatever its parsers raise, with addresses in some texts
            raise InvalidRequestError(
                f"{name}: got an image with a damaged header ({type(error).__name__}); save or copy it again"
            ) from None
        with image:
            check_pixels(image.height, image.width, limits, name)
            yield image


def _array_size(array: np.ndarray, limits: LimitsConfig, name: str) -> tuple[int, int]:
    is_shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not is_shaped:
        raise InvalidRequestError(
            f"{name}: got an array {array.dtype} {list(array.shape)}, expected uint8 [height, width, 3] or "
            "[height, width]"
        )
    height, width = array.shape[:2]
    check_pixels(height, width, limits, name)
    return height, width
