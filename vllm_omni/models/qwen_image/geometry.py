"""Sizes of what Qwen-Image makes and of the pictures it edits. Knows no weights and reads no picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_omni.params import DiffusionParams
from vllm_omni.worker.diffusion.patches import PATCH

NATIVE_LATENTS = 128  # along both sides, where nothing says the size
EDITED_AREA = 1024 * 1024  # pixels that a picture to edit is given, whatever it has
EDITED_MULTIPLE = 32


@dataclass(frozen=True, slots=True)
class ImageGeometry:
    """What the checkpoint's VAE implies."""

    vae_scale: int  # pixels of a latent, along each side

    @property
    def multiple(self) -> int:
        """Both sides of what is made are multiples of so many pixels."""
        return self.vae_scale * PATCH

    def size(self, params: DiffusionParams, given: Sequence[int] | None = None) -> tuple[int, int]:
        """(height, width) in pixels of what is made. given: what a request's picture makes of it."""
        native = NATIVE_LATENTS * self.vae_scale
        sides = (native, native) if given is None else given
        height, width = (
            side if asked is None else asked for asked, side in zip((params.height, params.width), sides, strict=True)
        )
        return height, width

    def source_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels of what starts from a picture of this size. A side is 0 where that is too small."""
        return height // self.multiple * self.multiple, width // self.multiple * self.multiple

    def edited_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels that a picture to edit is encoded at: of its form, and of EDITED_AREA. A side is 0
        where the picture is too narrow for that.
        """
        multiple = max(EDITED_MULTIPLE, self.multiple)
        ratio = width / height
        wide = math.sqrt(EDITED_AREA * ratio)
        return round(wide / ratio / multiple) * multiple, round(wide / multiple) * multiple
