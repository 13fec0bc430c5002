"""Pictures that are decoded in tiles, so that decoding takes no more memory than one tile does. Neighbouring tiles
overlap and are blended, as diffusers' AutoencoderKL does where tiling is enabled; here a tile is chosen for each
picture, and the autoencoder, which all requests share, is told nothing.

A tile's normalisation sees the tile alone, so a picture in tiles is near the whole one, and not it.

Legend: C latent channels, h and w latents of the picture, H and W its pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import brief, check_number
from vllm_omni.utils.files import read_json
from vllm_omni.worker.diffusion.previewer import to_pixels
from vllm_omni.worker.diffusion.published_part import vae_dtype

OVERLAP = 4  # a quarter of a tile lies over its neighbour
MAX_SIDE = 2**16  # pixels
MAX_WIDTH = 2**20  # channels
MIN_TILE = 16  # latents along each side; below that, seams show and most work is done twice
SHARE_OF_TEMPORARIES = 1.1  # what a decoder's convolutions take besides the tensors that are counted


@dataclass(frozen=True, slots=True)
class DecodingSize:
    """What decoding takes, known of an autoencoder from its configuration alone."""

    scale: int  # pixels of a latent, along each side
    # latents along each side of the largest tile, a multiple of OVERLAP; None: it decodes nothing in tiles
    tile: int | None
    pixel_bytes: int  # of activations at the widest moment, for each pixel of the result
    most_pixels: int | None = None  # that are planned for, of a model that may be asked for more; None: the limit's

    @classmethod
    def of_folder(cls, folder: Path, scale: int, dtype: torch.dtype) -> DecodingSize:
        """Of an AutoencoderKL, and of those that are built like it, from its `config.json`. dtype: of its stage."""
        file = folder / "config.json"
        config = {"sample_size": 1024, "block_out_channels": [64], **read_json(file)}
        widths = config.get("decoder_block_out_channels") or config["block_out_channels"]
        if not isinstance(widths, list) or not widths:
            raise ConfigError(f"{file}: block_out_channels: got {brief(widths)}, expected a list of widths")
        for width in widths:
            check_number(f"{file}: block_out_channels", width, 1, MAX_WIDTH, integer=True, raises=ConfigError)
        check_number(f"{file}: sample_size", config["sample_size"], 1, MAX_SIDE, integer=True, raises=ConfigError)
        return cls.of_autoencoder(widths, scale, config["sample_size"], vae_dtype(config, dtype).itemsize)

    @classmethod
    def of_autoencoder(cls, widths: Sequence[int], scale: int, sample_size: int, itemsize: int) -> DecodingSize:
        """Of a decoder as AutoencoderKL has it. widths: of its blocks (`block_out_channels`), the last that runs first.
        sample_size: pixels of a side that it was trained on, which are a tile. scale: of the latents that a trajectory
        has, which may be patches of the autoencoder's own.

        At full resolution the last block reads what the upsampling before it gave, three times at once (itself, normed,
        activated), or holds its own width five times. Measured within 10%: 3174 bytes for 128, 256, .. in float32.
        """
        widest = max(3 * widths[min(1, len(widths) - 1)], 5 * widths[0])
        return cls.of_widest(widest * itemsize, scale, sample_size)

    @classmethod
    def of_widest(cls, num_bytes: int, scale: int, sample_size: int) -> DecodingSize:
        """num_bytes: of the tensors that are held at the widest moment, for each pixel of the result."""
        tile = max(sample_size // scale // OVERLAP * OVERLAP, MIN_TILE)
        return cls(scale, tile, int(SHARE_OF_TEMPORARIES * num_bytes))

    def num_bytes(self, height: int, width: int) -> int:
        """Of a picture, or a tile of one, of so many latents."""
        return height * width * self.scale**2 * self.pixel_bytes

    @property
    def tiles(self) -> list[int]:
        """The sides that a tile may have, the largest first."""
        assert self.tile is not None
        sides = [self.tile]
        while sides[-1] % (2 * OVERLAP) == 0 and sides[-1] // 2 >= MIN_TILE:
            sides.append(sides[-1] // 2)
        return sides


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one stage decodes pictures."""

    size: DecodingSize
    budget_bytes: int | None = None  # that decoding one may take; None: as much as it takes
    is_always: bool = False  # whether also those that fit are decoded in tiles, of the largest size

    def tile_of(self, height: int, width: int) -> int | None:
        """The side of the tiles for a picture of so many latents: the largest that fits the budget, or the smallest
        that there is. None where it is decoded whole.
        """
        budget, sides = self.budget_bytes, self.size.tiles
        if budget is not None and self.size.num_bytes(height, width) > budget:
            tile = next((side for side in sides if self.size.num_bytes(side, side) <= budget), sides[-1])
        elif self.is_always:
            tile = sides[0]
        else:
            return None
        return tile if height > tile or width > tile else None


def num_tiles(latents: Tensor, tile: int) -> int:
    """How many pieces `decode_tiles` gives. latents: [C, h, w]."""
    rows, columns = (len(_starts(length, tile)) for length in latents.shape[1:])
    return rows * columns


def decode_tiles(decode: Callable[[Tensor], Tensor], latents: Tensor, tile: int, scale: int) -> Iterator[Tensor]:
    """A piece for each tile, row by row, each computed when it is asked for: uint8 [n, W, 3], the finished pixel rows
    behind the last tile of a row, and none before it. decode: [C, h, w] -> [3, H, W] float, 0 to 1 being what can be
    shown. latents: [C, h, w].
    """
    extent, kept = tile // OVERLAP * scale, (tile - tile // OVERLAP) * scale
    width = latents.shape[2] * scale
    above: list[Tensor] = []  # the lower edges of the tiles above, [3, n, pixels of the tile]
    for top in _starts(latents.shape[1], tile):
        edges: list[Tensor] = []
        before: Tensor | None = None  # the right edge of the tile to the left
        strip: list[Tensor] = []
        starts = _starts(latents.shape[2], tile)
        for column, left in enumerate(starts):
            pixels = decode(latents[:, top : top + tile, left : left + tile])
            if above:
                pixels = _blended(above[column], pixels, extent, dim=1)
            if before is not None:
                pixels = _blended(before, pixels, extent, dim=2)
            before = pixels[:, :, -extent:]
            edges.append(pixels[:, -extent:])
            strip.append(pixels[:, :kept, :kept])
            is_last = column == len(starts) - 1
            yield to_pixels(torch.cat(strip, dim=2) if is_last else pixels.new_empty(3, 0, width))
        above = edges


def _starts(length: int, tile: int) -> range:
    return range(0, length, tile - tile // OVERLAP)


def _blended(before: Tensor, pixels: Tensor, extent: int, dim: int) -> Tensor:
    """The tile with its beginning faded in over the end of the one before it, along a dimension."""
    extent = min(before.shape[dim], pixels.shape[dim], extent)
    ramp = torch.arange(extent, device=pixels.device, dtype=pixels.dtype) / extent
    ramp = ramp[:, None] if dim == 1 else ramp
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    begin = torch.lerp(end, pixels.narrow(dim, 0, extent), ramp)
    rest = pixels.narrow(dim, extent, pixels.shape[dim] - extent)
    return torch.cat([begin, rest], dim=dim)
