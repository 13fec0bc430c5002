"""Pixels -> patches as the vision encoder of Qwen2-VL and its kin reads them (arXiv:2409.12191, section 2.1).

Legend: T frames, H and W pixels, p patch size, m merge size (m x m patches are one token), t frames of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.media.video_input import FrameSettings
from vllm_omni.utils.checkpoint_files import reading
from vllm_omni.utils.files import read_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3
MAX_ASPECT_RATIO = 200
IMAGE_PIXELS = (56 * 56, 28 * 28 * 1280)  # of a picture, where no file says it: transformers'
VIDEO_PIXELS = (128 * 28 * 28, 768 * 28 * 28)  # of a frame
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True, slots=True)
class ImageArea:
    """A size that pictures are brought to before the checkpoint's own processor resizes them: about as many pixels in
    all, in about the shape that they had. The rule is that of diffusers' QwenImageEditPlusPipeline.
    """

    area: int  # pixels
    multiple: int  # of which both sides are

    def fit(self, height: int, width: int) -> tuple[int, int]:
        ratio = width / height
        new_width = math.sqrt(self.area * ratio)
        new_height = new_width / ratio
        sides = [max(1, round(side / self.multiple)) * self.multiple for side in (new_height, new_width)]
        return sides[0], sides[1]


@dataclass(frozen=True, slots=True)
class VisionGrid:
    """Sizes and colours of one kind of picture."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int  # of a frame when it has been resized
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float

    @property
    def factor(self) -> int:
        """Pixels at the side of a token."""
        return self.patch_size * self.merge_size

    def fit(self, height: int, width: int, name: str, max_pixels: int | None = None) -> tuple[int, int]:
        """The size to which a picture is resized, sides of at least one token; InvalidRequestError for one that no
        patches cover well. max_pixels: the caller's, where it is the smaller one.
        """
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise InvalidRequestError(
                f"{name}: got {width}x{height} pixels, expected sides that differ at most {MAX_ASPECT_RATIO} times; "
                "cut it"
            )
        sides = [round(side / self.factor) * self.factor for side in (height, width)]
        most = self.max_pixels if max_pixels is None else min(max_pixels, self.max_pixels)
        if sides[0] * sides[1] > most:
            scale = math.sqrt(height * width / most)
            sides = [max(1, math.floor(side / scale / self.factor)) * self.factor for side in (height, width)]
        elif sides[0] * sides[1] < self.min_pixels <= most:
            scale = math.sqrt(self.min_pixels / (height * width))
            sides = [math.ceil(side * scale / self.factor) * self.factor for side in (height, width)]
        return sides[0], sides[1]

    def tokens(self, num_frames: int, size: tuple[int, int]) -> tuple[int, int, int]:
        """(time, height, width) in tokens of pictures that have been resized to `size`."""
        return -(-num_frames // self.temporal_patch_size), size[0] // self.factor, size[1] // self.factor

    def patches(self, frames: Tensor) -> Tensor:
        """frames: uint8 [T, 3, H, W], resized. Returns float32 [patches, 3*t*p*p], the patches of a token together."""
        t, m, p = self.temporal_patch_size, self.merge_size, self.patch_size
        scale = 1.0 / self.rescale_factor
        mean = torch.tensor(self.mean)[:, None, None] * scale
        std = torch.tensor(self.std)[:, None, None] * scale
        normal = (frames.float() - mean) / std
        missing = -len(frames) % t
        normal = torch.cat([normal, normal[-1:].expand(missing, -1, -1, -1)])
        height, width = frames.shape[-2:]
        # [T/t, t, 3, H/pm, m, p, W/pm, m, p]
        split = normal.view(-1, t, 3, height // (p * m), m, p, width // (p * m), m, p)
        return split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * t * p * p)


@dataclass(frozen=True, slots=True)
class VisionSettings:
    """What a checkpoint folder says of images and of videos."""

    image: VisionGrid
    video: VisionGrid
    min_frames: int  # that are picked of a video
    max_frames: int

    @property
    def frames(self) -> FrameSettings:
        """How the frames of a video are picked and resized."""
        return FrameSettings(self.video.temporal_patch_size, self.min_frames, self.max_frames, self.video.fit)

    @classmethod
    def of(cls, folder: Path, video_tokens: tuple[int, int] | None = None) -> VisionSettings:
        """ConfigError for a way of processing that is not known here, CheckpointError for a file that is missing or
        holds something else. video_tokens: the fewest and the most of a frame, of a processor that reads them from no
        file.
        """
        with reading(f"{folder}: the settings of its image and video processors"):
            image = _section(folder, "image_processor", ("preprocessor_config.json",))
            video = _section(folder, "video_processor", ("video_preprocessor_config.json", "preprocessor_config.json"))
            token_pixels = _grid(video, folder).factor ** 2
            pixels = None if video_tokens is None else (video_tokens[0] * token_pixels, video_tokens[1] * token_pixels)
            return cls(
                image=_grid(image, folder, _pixels(image, IMAGE_PIXELS)),
                video=_grid(video, folder, pixels or _pixels(video, VIDEO_PIXELS)),
                min_frames=int(video.get("min_frames", 4)),
                max_frames=int(video.get("max_frames", 768)),
            )


def find_processor(model_folder: Path) -> Path | None:
    """The folder with the settings of a checkpoint's processors: its own, else `processor` beside it (as diffusers lays
    it out); None where neither has any.
    """
    folders = (model_folder, model_folder.parent / "processor")
    return next((folder for folder in folders if any((folder / name).is_file() for name in PROCESSOR_FILES)), None)


def _section(folder: Path, name: str, files: tuple[str, ...]) -> Mapping[str, Any]:
    """Where the library looks: one file for all processors, else a file of its own."""
    joint = folder / "processor_config.json"
    if joint.is_file():
        section = read_json(joint).get(name)
        if isinstance(section, Mapping):
            return section
    found = [folder / file for file in files if (folder / file).is_file()]
    return read_json(found[0] if found else folder / files[-1])


def _grid(section: Mapping[str, Any], folder: Path, pixels: tuple[int, int] = (1, 1)) -> VisionGrid:
    for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if section.get(key, True) is not True:
            raise ConfigError(f"{folder}: got {key} {section[key]!r}, expected true: pictures are prepared that way")
    if section.get("resample", BICUBIC) != BICUBIC:
        raise ConfigError(f"{folder}: got resample {section['resample']!r}, expected {BICUBIC} (bicubic)")
    return VisionGrid(
        patch_size=int(section.get("patch_size", 14)),
        merge_size=int(section.get("merge_size", 2)),
        temporal_patch_size=int(section.get("temporal_patch_size", 2)),
        min_pixels=pixels[0],
        max_pixels=pixels[1],
        mean=tuple(section.get("image_mean", CLIP_MEAN)),
        std=tuple(section.get("image_std", CLIP_STD)),
        rescale_factor=float(section.get("rescale_factor", 1 / 255)),
    )


def _pixels(section: Mapping[str, Any], usual: tuple[int, int]) -> tuple[int, int]:
    size = section.get("size") or {}
    least = section.get("min_pixels") or size.get("shortest_edge") or usual[0]
    most = section.get("max_pixels") or size.get("longest_edge") or usual[1]
    return int(least), int(most)
