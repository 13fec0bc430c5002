"""What a hosted pipeline returned, whatever its field or nesting is called, as the tensor of a stage's port."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vllm_omni.engine.diffusers.pipeline_class import AUDIO_FIELDS, IMAGE_FIELDS, VIDEO_FIELDS
from vllm_omni.errors import StageError
from vllm_omni.media.image_encoding import on_white
from vllm_omni.worker.diffusion.diffusion_model import check_finite

FIELDS = {"image": IMAGE_FIELDS, "audio": AUDIO_FIELDS, "soundtrack": AUDIO_FIELDS, "video": VIDEO_FIELDS}
VIDEO_DIMS = 4  # of one video as an array or tensor
BLANKED_FIELDS = ("nsfw_content_detected", "nsfw_detected")


def result_tensor(result: Any, kind: str) -> Tensor:
    """The tensor of a port: image [N, H, W, 3] uint8, audio and soundtrack [N, channels, n] float32, video
    [N, n, H, W, 3] uint8. StageError for a result that holds no such thing, or values that are not finite.
    """
    made = _field(result, FIELDS[kind])
    if made is None:
        raise StageError(f"the pipeline gave a {type(result).__name__} without {kind}s; is `output` right?")
    return {"image": _pictures, "video": _videos}.get(kind, _sounds)(made)


def has_made(result: Any, port: str) -> bool:
    """Whether a port has what it promises; only the sound of a video may be missing, where none was asked for."""
    return port != "soundtrack" or _field(result, FIELDS[port]) is not None


def blanked(result: Any) -> list[bool]:
    """For each picture whether the pipeline's safety checker has made it black; empty where it has none."""
    found = _field(result, BLANKED_FIELDS)
    return [bool(flag) for flag in _flat(found)] if found is not None else []


def _field(result: Any, names: tuple[str, ...]) -> Any:
    values = result if isinstance(result, Mapping) else getattr(result, "__dict__", {})
    return next((values[name] for name in names if values.get(name) is not None), None)


def _pictures(made: Any) -> Tensor:
    pictures = [_pixels(picture) for picture in _flat(made)]
    if not pictures:
        raise StageError("the pipeline gave no picture at all")
    sizes = sorted({tuple(picture.shape[:2]) for picture in pictures})
    if len(sizes) > 1:
        raise StageError(f"the pipeline gave pictures of several sizes, {sizes[0]} and {sizes[1]}; ask for one size")
    return torch.from_numpy(np.stack(pictures))


def _videos(made: Any) -> Tensor:
    """Frame by frame, so that all of them are never there as floats a second time."""
    videos = _frames_of_each(made)
    if not videos or not all(map(len, videos)):
        raise StageError("the pipeline gave no frame at all")
    if len({len(frames) for frames in videos}) > 1:
        raise StageError(f"the pipeline gave videos of {sorted(map(len, videos))} frames; ask for one length")
    first = torch.from_numpy(_pixels(videos[0][0]))
    whole = first.new_empty(len(videos), len(videos[0]), *first.shape)
    for index, frames in enumerate(videos):
        for number, frame in enumerate(frames):
            pixels = torch.from_numpy(_pixels(frame))
            if pixels.shape != first.shape:
                sizes = f"{list(first.shape[:2])} and {list(pixels.shape[:2])}"
                raise StageError(f"the pipeline gave frames of several sizes, {sizes}; ask for one size")
            whole[index, number] = pixels
    return whole


def _frames_of_each(made: Any) -> list[Any]:
    """The frames of every video, in a list of lists, in arrays or tensors of one or several, or in one list."""
    if isinstance(made, (np.ndarray, Tensor)):
        return [made] if made.ndim == VIDEO_DIMS else list(made)
    is_each_whole = all(isinstance(part, (list, tuple)) or getattr(part, "ndim", None) == VIDEO_DIMS for part in made)
    return list(made) if is_each_whole else [made]


def _flat(made: Any) -> Iterator[Any]:
    """What lies in lists of lists, in order; an array or tensor of several gives each."""
    depth = made.ndim if isinstance(made, (np.ndarray, Tensor)) else None
    if isinstance(made, (list, tuple)) or (depth is not None and depth != 3 and depth > 0):
        for part in made:
            yield from _flat(part)
    else:
        yield made


def _pixels(picture: Any) -> np.ndarray[Any, Any]:
    """[H, W, 3] uint8 of a PIL image, or of an array or tensor in [0, 1] that has 1, 3 or 4 channels."""
    if isinstance(picture, Image.Image):
        return np.array(on_white(picture))
    if not isinstance(picture, (np.ndarray, Tensor)):
        raise StageError(f"the pipeline gave a {type(picture).__name__} in place of a picture")
    values = torch.as_tensor(picture).detach().float().cpu()
    if isinstance(picture, Tensor) and values.shape[0] in (1, 3, 4):
        values = values.permute(1, 2, 0)
    if values.shape[-1] not in (1, 3, 4):
        raise StageError(f"the pipeline gave a picture of shape {list(picture.shape)}, expected 1, 3 or 4 channels")
    check_finite(values, "the pixels")
    pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[pixels.shape[-1]]
    return np.array(on_white(Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode)))


def _sounds(made: Any) -> Tensor:
    sounds = made if isinstance(made, Tensor) else torch.stack([torch.as_tensor(np.asarray(each)) for each in made])
    sounds = sounds.detach().float()
    sounds = sounds[:, None] if sounds.dim() == 2 else sounds
    if sounds.dim() != 3:
        raise StageError(f"the pipeline gave sounds of shape {list(sounds.shape)}, expected [N, channels, n]")
    check_finite(sounds, "the samples")
    return sounds
