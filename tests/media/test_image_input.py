"""Pictures that a request brings: what is transparent is white, what is deeper than 8 bits is scaled, what is turned is
upright, and every format that Pillow reads safely is read.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.media import picture
from transformers.image_transforms import convert_to_rgb

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.image_input import image_size, read_image

LIMITS = LimitsConfig(max_image_pixels=10_000)


def pixels(source: Any) -> np.ndarray[Any, Any]:
    found = read_image(source, LIMITS, "image").numpy()
    assert image_size(source, LIMITS, "image") is not None and found.dtype == np.uint8 and found.shape[2] == 3
    return found


def file_bytes(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def half_clear(mode: str) -> Image.Image:
    """Black, from opaque on the left to clear on the right."""
    alpha = np.tile(np.linspace(255, 0, 16).astype(np.uint8), (8, 1))
    layers = np.zeros((8, 16, 4), np.uint8)
    layers[..., 3] = alpha
    return Image.fromarray(layers).convert(mode)


def with_trns(color_type: int, bits: int, rows: list[bytes], trns: bytes) -> bytes:
    """A PNG that names one colour transparent."""
    width = len(rows[0]) * 8 // (bits * (3 if color_type == 2 else 1))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, len(rows), bits, color_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"tRNS", trns)
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La"])
def test_what_is_transparent_is_white_as_in_the_reference(mode: str) -> None:
    image = half_clear("LA").convert(mode) if mode == "La" else half_clear(mode)
    found = pixels(image)
    assert found[0, 0].max() == 0 and found[0, -1].min() == 255
    if mode in ("RGBA", "LA"):
        assert np.array_equal(found, convert_to_rgb(image, return_numpy=True))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La"])
def test_what_is_transparent_stays_so_where_that_is_asked_for(mode: str) -> None:
    image = half_clear("LA").convert(mode) if mode == "La" else half_clear(mode)
    found = read_image(image, LIMITS, "image", "RGBA").numpy()
    assert found.shape == (8, 16, 4) and np.array_equal(found[..., 3], np.asarray(half_clear("RGBA"))[..., 3])


def test_a_file_without_transparency_is_opaque_where_it_is_asked_for() -> None:
    for image in (Image.new("L", (2, 2), 7), Image.new("I;16", (2, 2), 7 * 257), np.full((2, 2), 7, np.uint8)):
        source = image if isinstance(image, np.ndarray) else file_bytes(image, "PNG")
        assert read_image(source, LIMITS, "image", "RGBA")[0, 0].tolist() == [7, 7, 7, 255]


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "GIF", "AVIF"])
def test_transparency_in_a_file_is_white(form: str) -> None:
    options = {} if form in ("GIF", "PNG", "TIFF") else {"lossless": True} if form == "WEBP" else {"quality": 100}
    image = half_clear("RGBA")
    if form == "GIF":  # which knows clear and opaque alone
        image = Image.new("P", (16, 8), 1)
        image.paste(0, (8, 0, 16, 8))
        options = {"transparency": 0}
    found = pixels(file_bytes(image, form, **options))
    assert found[0, 0].max() <= 8 and found[0, -1].min() >= 247


def test_a_palette_with_transparency_is_white_there() -> None:
    image = Image.new("P", (4, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    for transparency in (0, b"\x00\xff"):
        found = pixels(file_bytes(image, "PNG", transparency=transparency))
        assert found[0, 0].tolist() == [255] * 3 and found[1, 1].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("content", "others"),
    [
        (with_trns(0, 8, [b"\x00\x40", b"\x40\x40"], b"\x00\x00"), [0x40] * 3),
        (with_trns(2, 8, [b"\0\0\0\x10\x20\x30", b"\x10\x20\x30" * 2], b"\0\0\0\0\0\0"), [0x10, 0x20, 0x30]),
        (with_trns(0, 16, [b"\x00\x00\x40\x40", b"\x40\x40" * 2], b"\x00\x00"), [0x40] * 3),
    ],
)
def test_one_transparent_colour_of_a_png_is_white(content: bytes, others: list[int]) -> None:
    found = pixels(content)
    assert found[0, 0].tolist() == [255] * 3 and found[1, 1].tolist() == others


# Depth


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(form: str) -> None:
    ramp = np.linspace(0, 65_535, 64).astype(np.uint16).reshape(8, 8)
    found = pixels(file_bytes(Image.fromarray(ramp), form))
    assert np.abs(found[..., 0] - ramp / 257).max() <= 0.5 and np.ptp(found, axis=2).max() == 0
    dark = pixels(file_bytes(Image.fromarray(ramp // 256), form))
    assert dark.max() == 1, "what is dark stays dark"


@pytest.mark.parametrize("full", [1.0, 255.0, 65_535.0])
def test_floats_are_scaled_by_what_they_reach(full: float) -> None:
    ramp = np.linspace(0, full, 64, dtype=np.float32).reshape(8, 8)
    for source in (Image.fromarray(ramp), file_bytes(Image.fromarray(ramp), "TIFF")):
        assert np.abs(pixels(source)[..., 0] - ramp / full * 255).max() <= 0.501


def test_wide_integers_are_scaled() -> None:
    for full, source in ((255, 255), (65_535, 65_535), (2**31 - 1, 2**31 - 1)):
        ramp = np.linspace(0, source, 64).astype(np.int32).reshape(8, 8)
        assert np.abs(pixels(Image.fromarray(ramp))[..., 0] - ramp / full * 255).max() <= 0.501
    assert pixels(Image.fromarray(np.ones((2, 2), np.int32))).max() == 1


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_pixels_that_are_no_brightness_are_refused(value: float) -> None:
    image = Image.fromarray(np.array([[0.5, value]], np.float32))
    with pytest.raises(InvalidRequestError, match="image: got an image of mode F with pixels from"):
        read_image(image, LIMITS, "image")


# Formats and orientation


@pytest.mark.parametrize(
    ("form", "mode"), [("TIFF", "RGB"), ("TIFF", "CMYK"), ("AVIF", "RGB"), ("TIFF", "1"), ("TIFF", "L")]
)
def test_formats_of_phones_and_scanners_are_read(form: str, mode: str) -> None:
    image = Image.fromarray(picture()).convert(mode)
    expected = np.asarray(image.convert("RGB")).astype(int)
    found = pixels(file_bytes(image, form, **({"quality": 100} if form == "AVIF" else {})))
    assert np.abs(found - expected).mean() <= 2


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_turned_picture_is_upright(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 16, axis=0).repeat(16, axis=1))  # 16 x 32
    found = pixels(file_bytes(image, form, exif=exif.tobytes())).astype(int)
    turns = {3: 2, 6: 3, 8: 1}[orientation]
    assert np.abs(found[..., 0] - np.rot90(np.asarray(image), turns)).mean() < 8


def test_limits_hold_before_anything_is_decoded() -> None:
    large = file_bytes(Image.new("RGBA", (101, 100)), "TIFF")
    for check in (image_size, read_image):
        with pytest.raises(InvalidRequestError, match="got 101x100 pixels, expected at most 10000"):
            check(large, LIMITS, "image")
