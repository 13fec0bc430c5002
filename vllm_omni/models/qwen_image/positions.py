"""Where the tokens of Qwen-Image stand: which image, row and column. Pictures are centred on 0, so that their middle
stays where it is at any size; text goes on behind them on all three axes. As diffusers' QwenEmbedRope has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_omni.worker.diffusion.joint import Geometry
from vllm_omni.worker.diffusion.rope_tables import grid_positions

THETA = 10_000.0
MAX_POSITION = 4096  # that the published model's tables hold


def positions(geometry: Geometry) -> Tensor:
    """[L, 3] integers, of a row's text, then of its picture (image 0) and its references (1, 2, ...)."""
    images = [_image_positions(index, *grid) for index, grid in enumerate(geometry.grids)]
    text = torch.arange(geometry.num_text) + first_text_position(geometry.grids)
    return torch.cat([text[:, None].expand(-1, 3), *images])


def first_text_position(grids: tuple[tuple[int, int], ...]) -> int:
    """Behind the last row and column of the largest image."""
    return max(side // 2 for grid in grids for side in grid)


def _image_positions(index: int, height: int, width: int) -> Tensor:
    centred = grid_positions(height, width) - torch.tensor([height - height // 2, width - width // 2])
    return torch.cat([torch.full((height * width, 1), index), centred], dim=-1)
