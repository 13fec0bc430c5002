"""Arrays of numpy and pictures of PIL as plain values, and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from vllm_omni.executor.wire.base import Tag, WireError
from vllm_omni.utils.checks import brief

ARRAY_KINDS = "biufcSU"  # of numpy dtypes: numbers and texts; never objects
MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBa", "La", "I;16")
MAX_PIXELS = 2**30
MAX_DIMS = 32
NOTES = ("transparency", "exif", "icc_profile")  # of what a picture's file says, what changes how it is read
Bytes = Callable[[bytes], Any]


def plain_array(array: np.ndarray[Any, Any], put: Bytes) -> list[Any]:
    _check_dtype(array.dtype)
    return [Tag.ARRAY, array.dtype.str, [Tag.LIST, *array.shape], put(array.tobytes())]


def read_array(dtype: Any, shape: Any, content: bytes) -> np.ndarray[Any, Any]:
    """Writable, and nobody else's."""
    kind = _read_dtype(dtype)
    sizes = shape if isinstance(shape, list) else [shape]
    if len(sizes) > MAX_DIMS or not all(type(size) is int and size >= 0 for size in sizes):
        raise WireError(f"got an array of the shape {brief(shape)}")
    if math.prod(sizes) * kind.itemsize != len(content):
        raise WireError(f"got {len(content)} bytes for an array {kind} {sizes}")
    return np.frombuffer(bytearray(content), dtype=kind).reshape(sizes)


def plain_scalar(value: np.generic) -> list[Any]:
    _check_dtype(value.dtype)
    return [Tag.SCALAR, value.dtype.str, value.tobytes()]


def read_scalar(dtype: Any, content: bytes) -> Any:
    return read_array(dtype, [], content)[()]


def plain_picture(image: Image.Image, put: Bytes) -> list[Any]:
    """The frame that it shows, decoded."""
    if image.mode not in MODES:
        raise WireError(f"got a picture of the mode {image.mode!r}, expected one of {', '.join(MODES)}")
    pixels = put(image.tobytes())  # first: what stands behind the pixels of a file is known then
    notes = {name: note for name in NOTES if isinstance(note := image.info.get(name), int | bytes)}
    exif = image.getexif()
    if len(exif):
        notes["exif"] = exif.tobytes()
    palette = image.palette
    colours = None if palette is None else [Tag.LIST, palette.mode, palette.tobytes()]
    return [Tag.PICTURE, image.mode, image.width, image.height, pixels, colours, notes]


def read_picture(mode: Any, width: Any, height: Any, pixels: bytes, palette: Any, notes: Any) -> Image.Image:
    if mode not in MODES or type(width) is not int or type(height) is not int:
        raise WireError(f"got a picture of mode {brief(mode)}, {brief(width)}x{brief(height)}")
    if width < 0 or height < 0 or width * height > MAX_PIXELS or width * height > 8 * len(pixels):
        raise WireError(f"got {len(pixels)} bytes for a picture of {width}x{height}")
    image = Image.frombytes(mode, (width, height), pixels)
    if palette is not None:
        image.putpalette(palette[1], palette[0])
    image.info.update({name: note for name, note in notes.items() if name in NOTES})
    return image


def _check_dtype(dtype: np.dtype[Any]) -> None:
    if dtype.kind not in ARRAY_KINDS or dtype.itemsize == 0 or dtype.names is not None:
        raise WireError(f"got an array of {dtype}, expected numbers or texts")


def _read_dtype(name: Any) -> np.dtype[Any]:
    if not isinstance(name, str) or len(name) > 16 or name[1:2] not in ARRAY_KINDS:
        raise WireError(f"got an array of {brief(name)}, expected numbers or texts")
    dtype = np.dtype(name)
    _check_dtype(dtype)
    return dtype
