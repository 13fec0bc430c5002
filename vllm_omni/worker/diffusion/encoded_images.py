"""Pictures that a request brings, as a diffusion model reads them: decoded within the limits, and encoded once for all
requests that bring the same. Knows no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from torch import Tensor

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.core.diffusion.dit_cache_manager import DiTCacheManager
from vllm_omni.media.image_input import read_image, read_mask


class EncodedImages:
    """caches: holds what was encoded, as long as there is room; of one stage alone."""

    def __init__(self, caches: DiTCacheManager, limits: LimitsConfig) -> None:
        self._caches = caches
        self._limits = limits

    def pixels(self, source: object, name: str) -> Tensor:
        """uint8 [H, W, 3], upright and on white; InvalidRequestError names it."""
        return read_image(source, self._limits, name)

    def mask(self, source: object, name: str) -> Tensor:
        """uint8 [H, W]: 255 where a picture is drawn anew, 0 where it is kept."""
        return read_mask(source, self._limits, name)

    def of(self, pixels: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """`encode(pixels)`, or what it gave for these very pixels before. pixels: uint8 [H, W, 3] on the CPU. encode:
        draws nothing, and is the same at every call.
        """
        content = hashlib.sha256(pixels.contiguous().numpy().tobytes()).digest()
        key = (content, tuple(pixels.shape))
        found: Tensor | None = self._caches.get_cache(key)
        if found is None:
            found = encode(pixels)
            self._caches.set_cache(key, found)
        return found
