"""What comes in as an image: from whatever a caller passes to pixels of a wanted size. Its header is read and measured
first; PIL's own guard against bombs stays on. What is transparent shows white, as transformers has it.
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
from vllm_omni.media.image_encoding import on_white, straight
from vllm_omni.media.source_files import caller_media, open_source_file

# PIL reads dozens, one of them by running a program; AVIF and HEIF where it, or a plugin that was registered, can
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
FULL_SCALES = (1.0, 2.0**8 - 1, 2.0**16 - 1, 2.0**31 - 1)  # of pixels that are wide integers or floats
SOURCES = (
    "a path, a data URI, the bytes of a file, a PIL image or a numpy array uint8 [height, width, 3] or [height, width]"
)
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # of Exif: these values swap height and width


@caller_media()
def image_size(source: object, limits: LimitsConfig, name: str) -> tuple[int, int]:
    """(height, width) from the header, nothing decoded, of the upright image where the header says how it lies;
    InvalidRequestError for what is no image or too large.
    """
    if isinstance(source, np.ndarray):
        return _array_size(source, limits, name)
    with _opened(source, limits, name) as image:
        return (image.width, image.height) if _lies_sideways(image) else (image.height, image.width)


@caller_media()
def read_image(source: object, limits: LimitsConfig, name: str, mode: str = "RGB") -> Tensor:
    """uint8 [height, width, channels of `mode`: RGB or RGBA], upright, of an animation the first picture. source: see
    SOURCES. InvalidRequestError for anything that cannot be read or is beyond `limits`.
    """
    if isinstance(source, np.ndarray):
        _array_size(source, limits, name)
        return torch.from_numpy(np.array(Image.fromarray(source).convert(mode)))
    with _opened(source, limits, name) as image:
        try:
            upright = (to_rgba if mode == "RGBA" else to_rgb)(ImageOps.exif_transpose(image), name)
        except InvalidRequestError:
            raise
        except Exception as error:  # the library raises whatever its parsers raise, with addresses in some texts
            raise InvalidRequestError(
                f"{name}: got an image that is damaged or truncated ({type(error).__name__}); save or copy it again"
            ) from None
        return torch.from_numpy(np.array(upright))


def read_mask(source: object, limits: LimitsConfig, name: str) -> Tensor:
    """uint8 [height, width], 255 being what is masked: what is white or, where anything is transparent, what is that.
    The second is how OpenAI's clients say it, the first how everybody else does.
    """
    pixels = read_image(source, limits, name, mode="RGBA")
    alpha = pixels[..., 3]
    if bool((alpha < 255).any()):
        return 255 - alpha
    return torch.from_numpy(np.array(Image.fromarray(pixels.numpy()).convert("L")))


def fitted(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [height, width, ...] -> [*size, ...], as diffusers resizes what is encoded (Pillow, Lanczos)."""
    if tuple(frame.shape[:2]) == size:
        return frame
    image = Image.fromarray(frame.numpy()).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image))


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """On white where it is transparent; pixels of 16 and 32 bits and floats are scaled to 8 bits. InvalidRequestError
    for pixels that are negative or not finite.
    """
    if image.mode.startswith(("I", "F")):
        return _scaled(image, name).convert("RGB")
    return on_white(image)


def to_rgba(image: Image.Image, name: str) -> Image.Image:
    """As `to_rgb`, but what is transparent stays so."""
    if image.mode.startswith(("I", "F")) or not image.has_transparency_data:
        return to_rgb(image, name).convert("RGBA")
    return straight(image).convert("RGBA")


def _scaled(image: Image.Image, name: str) -> Image.Image:
    """8 bit grey of wide integers and floats. Those of 16 bits have their full scale; of others it is the least of
    FULL_SCALES that holds every pixel.
    """
    pixels = np.asarray(image).astype(np.float64)
    if not np.isfinite(pixels).all() or pixels.min() < 0:
        raise InvalidRequestError(
            f"{name}: got an image of mode {image.mode} with pixels from {pixels.min():g} to {pixels.max():g}, "
            "expected finite ones of at least 0; scale them"
        )
    most = max(pixels.max(), 1.0)
    full = FULL_SCALES[2] if image.mode.startswith("I;16") else next((f for f in FULL_SCALES if most <= f), most)
    if image.mode == "I" and full == FULL_SCALES[0]:
        full = FULL_SCALES[1]
    grey = np.rint(pixels * (255 / full)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[pixels == transparent] = 255
    return Image.fromarray(grey)


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


def _lies_sideways(image: Image.Image) -> bool:
    """As far as what is read of a file already says; a picture whose note of it stands behind the pixels is measured as
    it lies.
    """
    if "exif" not in image.info and image.format != "TIFF":
        return False
    try:
        return image.getexif().get(ORIENTATION) in SIDEWAYS
    except Exception:  # the library raises whatever its parsers raise; what is damaged is said when it is read
        return False


def _readable_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


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
            image = Image.open(file, formats=_readable_formats())
        except Image.DecompressionBombError:
            raise InvalidRequestError(
                f"{name}: got an image so large that it is taken for an attack, expected at most "
                f"{limits.max_image_pixels} pixels (limits.max_image_pixels); make it smaller"
            ) from None
        except UnidentifiedImageError:
            raise InvalidRequestError(
                f"{name}: got a file that is no whole image, expected {', '.join(_readable_formats())}"
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
