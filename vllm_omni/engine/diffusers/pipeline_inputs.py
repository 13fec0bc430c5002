"""What a request gives a hosted pipeline besides numbers and words: pictures, masks, sounds, tensors. Checked against
the limits before work begins, and brought into the one form that pipelines agree on: upright RGB pictures, masks in
grey, sounds at the pipeline's own rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio_input import check_audio, read_audio
from vllm_omni.media.image_input import image_size, read_image, read_mask
from vllm_omni.utils.checks import brief
from vllm_omni.worker.background import Stop
from vllm_omni.worker.diffusion.diffusion_model import check_limit

MAX_DEPTH = 4  # of lists in lists
MAX_VALUES = 10_000  # in all lists and mappings of one argument
MAX_CHANNELS = 4  # of a picture that is given as a tensor
PICTURE_WORDS = ("image", "mask")
NO_PICTURES = (
    "embed",
    "latent",
    "attention",
    "num_",
    "_scale",
    "_ids",
    "_grid",
    "_crop",
    "_size",
    "_noise",
    "_seconds",
)
SOUNDS = ("initial_audio_waveforms", "src_audio", "reference_audio", "audio")
BATCHED_SOUNDS = ("initial_audio_waveforms",)  # [1, channels, n]; the others are [channels, n]


@dataclass(frozen=True, slots=True)
class MediaFormat:
    """What a pipeline's autoencoder takes."""

    mode: str = "RGB"  # of pictures; RGBA where their transparency is encoded too
    min_side: int = 8  # pixels of a picture along each side; the usual autoencoder makes one latent of them
    rate: int = 44_100  # Hz
    channels: int = 2  # of sounds


def is_picture(name: str) -> bool:
    """Whether an argument of that name takes pictures or masks."""
    return any(word in name for word in PICTURE_WORDS) and not any(word in name for word in NO_PICTURES)


def is_sound(name: str) -> bool:
    return name in SOUNDS


def check_media(name: str, key: str, value: object, form: MediaFormat, limits: LimitsConfig) -> None:
    """A picture or a sound, by its key. name: how messages call it."""
    if is_picture(key):
        check_pictures(name, value, form, limits)
    elif isinstance(value, Tensor) and value.dim() > 2:
        _check_tensor(name, value, limits)
    else:
        check_audio(_with_rate(value, form), channels=form.channels, limits=limits, name=name)


def check_pictures(name: str, value: object, form: MediaFormat, limits: LimitsConfig) -> None:
    """InvalidRequestError for what is no picture, and no list of them, within the limits. Nothing is decoded."""
    count = 0

    def check(item: Any) -> None:
        nonlocal count
        count += 1
        check_limit(f"{name}: number of images", count, 0, limits.max_images, integer=True)
        if isinstance(item, Tensor):
            _check_tensor(name, item, limits)
            return
        height, width = image_size(item, limits, name)
        check_limit(f"{name}: width * height", height * width, 1, limits.max_pixels, integer=True)
        if min(height, width) < form.min_side:
            raise InvalidRequestError(
                f"{name}: got {width}x{height} pixels, expected at least {form.min_side} pixels a side; enlarge it"
            )

    _each(name, value, check)


def read_pictures(name: str, value: object, form: MediaFormat, limits: LimitsConfig, stop: Stop) -> Any:
    """PIL images in the same lists: upright and of the pipeline's mode; masks in grey. Tensors stay as they are. stop:
    is called before each.
    """

    def read(item: Any) -> Any:
        stop()
        if isinstance(item, Tensor):
            return item
        read = read_mask(item, limits, name) if "mask" in name else read_image(item, limits, name, form.mode)
        return Image.fromarray(read.numpy())

    return _each(name, value, read)


def read_sounds(name: str, value: object, form: MediaFormat, limits: LimitsConfig, stop: Stop) -> Tensor:
    """float32 [channels, n] at the pipeline's rate, which a bare array has already; [1, channels, n] where the pipeline
    takes a batch. A tensor of three dimensions stays as it is.
    """
    if isinstance(value, Tensor) and value.dim() > 2:
        return value
    given = _with_rate(value, form)
    samples = read_audio(given, sample_rate=form.rate, channels=form.channels, limits=limits, name=name, stop=stop)
    read = torch.from_numpy(samples)
    return read[None] if name in BATCHED_SOUNDS else read


def check_value(name: str, value: object, form: MediaFormat, limits: LimitsConfig) -> None:
    """Everything else that an argument may be: plain values, tensors, and lists and mappings of them, within limits."""
    num_values = 0

    def check(item: Any, depth: int) -> None:
        nonlocal num_values
        num_values += 1
        if num_values > MAX_VALUES or depth > MAX_DEPTH:
            raise InvalidRequestError(
                f"{name}: got more than {MAX_VALUES} values, or lists deeper than {MAX_DEPTH}; make it smaller"
            )
        if isinstance(item, (Mapping, list, tuple)):
            for part in item.values() if isinstance(item, Mapping) else item:
                check(part, depth + 1)
        else:
            _check_single(name, item, form, limits)

    check(value, 0)


def _check_single(name: str, item: object, form: MediaFormat, limits: LimitsConfig) -> None:
    if isinstance(item, (Tensor, np.ndarray)):
        _check_tensor(name, torch.as_tensor(item), limits)
    elif isinstance(item, Image.Image):
        check_pictures(name, item, form, limits)
    elif isinstance(item, str):
        if len(item) > limits.max_prompt_chars:
            raise InvalidRequestError(f"{name}: got {len(item)} characters (limits.max_prompt_chars)")
    elif isinstance(item, (int, float)) and not isinstance(item, bool):
        check_limit(name, item, -limits.max_pixels, limits.max_pixels)
    elif item is not None and not isinstance(item, bool):
        raise InvalidRequestError(f"{name}: got {brief(item)}, expected plain values, tensors or images")


def _check_tensor(name: str, value: Tensor, limits: LimitsConfig) -> None:
    check_limit(f"{name}: number of values", value.numel(), 0, MAX_CHANNELS * limits.max_pixels, integer=True)
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise InvalidRequestError(f"{name}: got values that are not finite")


def _with_rate(value: object, form: MediaFormat) -> object:
    """A bare array has the pipeline's own rate."""
    return (value, form.rate) if isinstance(value, (np.ndarray, Tensor)) else value


def _each(name: str, value: object, function: Callable[[Any], Any], depth: int = 0) -> Any:
    """`function` of every picture, in the same lists."""
    if not isinstance(value, (list, tuple)):
        return function(value)
    if depth >= MAX_DEPTH:
        raise InvalidRequestError(f"{name}: got lists deeper than {MAX_DEPTH}, expected images or lists of them")
    return [_each(name, item, function, depth + 1) for item in value]
