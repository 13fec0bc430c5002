"""Pictures as the bytes of a file, with what they say of how they were made. Knows no request and no path."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image, PngImagePlugin

from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.metadata import MediaMetadata
from vllm_omni.utils.checks import brief, check_number, did_you_mean

# name -> (PIL's name, suffixes); what the installed Pillow cannot write is refused when it is asked for
IMAGE_FORMATS = {
    "png": ("PNG", (".png",)),
    "jpeg": ("JPEG", (".jpg", ".jpeg")),
    "webp": ("WEBP", (".webp",)),
    "avif": ("AVIF", (".avif",)),
    "tiff": ("TIFF", (".tif", ".tiff")),
}
IMAGE_SUFFIXES = {suffix: name for name, (_, suffixes) in IMAGE_FORMATS.items() for suffix in suffixes}
QUALITIES = {"jpeg": 95, "webp": 90, "avif": 85}  # of 100, where the caller says none; the others are lossless
EXIF_IFD, USER_COMMENT, SOFTWARE = 0x8769, 0x9286, 0x0131
PNG_LEVEL = 1  # of 9; 20% (screenshots) to 70% (smooth colours) less time than the usual 6, for larger files
UNICODE = b"UNICODE\0"  # how a UserComment begins that is UTF-16 (Exif 2.32, 4.6.5)
MAX_EXIF_BYTES = 60_000  # a JPEG holds 64 KB
MAX_EXIF_PROMPT = 5_000  # characters of each prompt that are left where they are more
WHITE = (255, 255, 255)
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


def encode_image(
    image: Image.Image, format: str, *, metadata: MediaMetadata | None = None, quality: int | None = None
) -> bytes:
    """The bytes of a file.

    format: a key of IMAGE_FORMATS. quality: 0 to 100, for jpeg, webp and avif; None takes QUALITIES'. metadata: goes to
    `parameters` of a PNG, to the UserComment of the others; a JPEG keeps 5,000 characters of a prompt for which it has
    no room. JPEG has no transparency: the picture is put on white. InvalidRequestError for an unknown format, one that
    the installed Pillow does not write, and a picture that the format does not hold.
    """
    check_image_format(format)
    options = {**_quality(format, quality), **_tags(format, metadata)}
    file = io.BytesIO()
    image = straight(image)
    try:
        (_opaque(image) if format == "jpeg" else image).save(file, IMAGE_FORMATS[format][0], **options)
    except (OSError, ValueError) as error:
        raise InvalidRequestError(
            f"{format}: a picture of {image.width}x{image.height} pixels, mode {image.mode}, cannot be written "
            f"({error}); choose another format"
        ) from error
    return file.getvalue()


def check_image_format(format: str) -> None:
    """InvalidRequestError for a format that cannot be written here."""
    if format not in IMAGE_FORMATS:
        raise InvalidRequestError(f"format: got {brief(format)}{did_you_mean(str(format)[:80], IMAGE_FORMATS)}")
    Image.init()
    if IMAGE_FORMATS[format][0] not in Image.SAVE:
        raise InvalidRequestError(f"format: got {format!r}, which the installed Pillow does not write; update it")


def straight(image: Image.Image) -> Image.Image:
    """The image itself, or what is premultiplied with its alpha divided by it again: few conversions and files know
    Pillow's modes La and RGBa.
    """
    return image.convert(PREMULTIPLIED[image.mode]) if image.mode in PREMULTIPLIED else image


def on_white(image: Image.Image) -> Image.Image:
    """RGB: what is transparent shows white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layers = straight(image).convert("RGBA")
    ground = Image.new("RGBA", layers.size, (*WHITE, 255))
    return Image.alpha_composite(ground, layers).convert("RGB")


def _opaque(image: Image.Image) -> Image.Image:
    return image if image.mode in ("L", "CMYK") and not image.has_transparency_data else on_white(image)


def _quality(format: str, quality: int | None) -> dict[str, int]:
    if format == "png" and quality is None:
        return {"compress_level": PNG_LEVEL}
    if quality is None:
        return {"quality": QUALITIES[format]} if format in QUALITIES else {}
    check_number("quality", quality, 0, 100, integer=True, raises=InvalidRequestError)
    if format not in QUALITIES:
        raise InvalidRequestError(f"quality: got {quality}, but {format} loses nothing; leave it out")
    return {"quality": quality}


def animation_tags(format: str, metadata: MediaMetadata | None) -> dict[str, Any]:
    """What Pillow is told so that a gif or a webp of several pictures says how it was made."""
    if metadata is None:
        return {}
    return {"comment": metadata.to_text().encode()} if format == "gif" else _tags(format, metadata)


def _tags(format: str, metadata: MediaMetadata | None) -> dict[str, Any]:
    if metadata is None:
        return {}
    if format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("parameters", metadata.to_text())
        if metadata.version:
            chunks.add_text("Software", metadata.version)
        return {"pnginfo": chunks}
    comment = _user_comment(metadata)
    if len(comment) > MAX_EXIF_BYTES:
        comment = _user_comment(metadata.shortened(MAX_EXIF_PROMPT))
    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = comment
    if metadata.version:
        exif[SOFTWARE] = metadata.version
    return {"exif": exif.tobytes()}  # TIFF overlooks a part of what is no bytes


def _user_comment(metadata: MediaMetadata) -> bytes:
    return UNICODE + metadata.to_text().encode("utf-16-be")
