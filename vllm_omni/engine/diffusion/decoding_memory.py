"""How much memory a stage may decode one picture in, and which pictures it decodes in tiles for that reason."""

from __future__ import annotations

from math import isqrt

from vllm_omni.worker.diffusion.tiling import DecodingSize, Tiling

MANY = 2**15  # latents of a side


class DecodingMemory:
    """Of one stage. size: of its decoder; None for one that bounds its memory itself. max_pixels: of a picture.
    mode: the stage's `vae_tiling`.
    """

    def __init__(self, mode: str, size: DecodingSize | None, max_pixels: int) -> None:
        self._mode = mode
        self._size = size
        self._has_tiles = size is not None and size.tile is not None
        self._whole_bytes = 0 if size is None else min(max_pixels, size.most_pixels or max_pixels) * size.pixel_bytes
        self._granted_bytes: int | None = None  # besides the least; None: nobody has planned

    @property
    def least_bytes(self) -> int:
        """Without which the stage cannot be: the largest picture or, where it can be decoded in tiles, the smallest
        tile. Frames of videos may be as small as a request says.
        """
        if self._size is None or not self._has_tiles:
            return 0
        if self._mode == "never":
            return self._whole_bytes
        tile = self._size.tiles[0 if self._mode == "always" else -1]
        return min(self._size.num_bytes(tile, tile), self._whole_bytes)

    @property
    def wanted_bytes(self) -> int:
        """What it could use besides."""
        return self._whole_bytes - self.least_bytes if self._mode == "auto" or not self._has_tiles else 0

    @property
    def num_bytes(self) -> int:
        return self.least_bytes + (self._granted_bytes or 0)

    def grant(self, num_bytes: int) -> None:
        self._granted_bytes = num_bytes

    def tiling(self) -> Tiling | None:
        """None for a decoder without tiles."""
        if self._size is None or not self._has_tiles:
            return None
        is_bounded = self._mode == "auto" and self._granted_bytes is not None and self.num_bytes < self._whole_bytes
        return Tiling(self._size, self.num_bytes if is_bounded else None, self._mode == "always")

    def remark(self) -> str:
        """Which pictures are decoded in tiles, and of which size, or do not fit; empty where none are."""
        if self._size is not None and not self._has_tiles:
            return self._remark_on_frames(self._size)
        tiling = self.tiling()
        tile = None if tiling is None else tiling.tile_of(MANY, MANY)
        if tiling is None or tile is None:
            return ""
        scale = tiling.size.scale
        words = f"decoded in tiles of {tile * scale}x{tile * scale}"
        if tiling.budget_bytes is None:
            return f"pictures of more pixels are {words} (vae_tiling: always)"
        side = isqrt(tiling.budget_bytes // tiling.size.pixel_bytes)
        return (
            f"pictures of more than {side}x{side} pixels are {words}: memory does not suffice for the largest"
            " (limits.max_pixels)"
        )

    def _remark_on_frames(self, size: DecodingSize) -> str:
        if self._granted_bytes is None or self.num_bytes == self._whole_bytes:
            return ""
        side = isqrt(self.num_bytes // size.pixel_bytes)
        return (
            f"decoding frames of the model's own size takes {self._whole_bytes / 2**30:.1f} GB; memory suffices for"
            f" {side}x{side} pixels"
        )
