"""Sizes and lengths of the videos of a Wan checkpoint. Knows no weights and reads no picture."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_omni.params import DiffusionParams


@dataclass(frozen=True, slots=True)
class Native:
    """What a checkpoint makes where nothing says otherwise."""

    height: int
    width: int
    num_frames: int
    fps: float


# As they are published: of Wan 2.2 TI2V, whose timesteps are those of single tokens, and of Wan 2.1 T2V.
TI2V = Native(704, 1280, 121, 24.0)
T2V = Native(480, 832, 81, 16.0)


@dataclass(frozen=True, slots=True)
class VideoGeometry:
    """What the VAE and the patches of a checkpoint imply."""

    scale: int  # pixels of a latent, along each side
    frame_scale: int  # frames of every frame of latents but the first, which is one
    down: int  # latents of a token, along each side
    across: int
    native: Native

    @property
    def multiples(self) -> tuple[int, int]:
        """Height and width of a video are multiples of these."""
        return self.scale * self.down, self.scale * self.across

    def size(self, params: DiffusionParams, picture: tuple[int, int] | None = None) -> tuple[int, int]:
        """(height, width) in pixels of what is made. picture: those of the first frame, if any."""
        sides = (self.native.height, self.native.width) if picture is None else self.size_like(*picture)
        height, width = (
            side if asked is None else asked for asked, side in zip((params.height, params.width), sides, strict=True)
        )
        return height, width

    def size_like(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the form of a picture, of at most as many pixels as the checkpoint makes by itself."""
        area, ratio = self.native.height * self.native.width, width / height
        sides = (math.sqrt(area / ratio), math.sqrt(area * ratio))
        down, across = (
            max(1, int(side / multiple)) * multiple for side, multiple in zip(sides, self.multiples, strict=True)
        )
        return down, across

    def num_frames(self, params: DiffusionParams) -> int:
        return self.native.num_frames if params.num_frames is None else params.num_frames

    def latent_size(self, params: DiffusionParams, size: tuple[int, int]) -> tuple[int, int, int]:
        """Frames, rows and columns of latents. size: (height, width) in pixels."""
        frames = (self.num_frames(params) - 1) // self.frame_scale + 1
        return frames, size[0] // self.scale, size[1] // self.scale

    def fps(self, params: DiffusionParams) -> float:
        return self.native.fps if params.fps is None else params.fps
