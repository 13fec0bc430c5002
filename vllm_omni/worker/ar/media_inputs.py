"""A MediaPrompt at work: its positions, and rows from the encoders in place of the placeholder tokens. Each item is
encoded once, when the first of its rows is needed; a prefix that the cache serves needs none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_omni.errors import StageError
from vllm_omni.layers.token_inputs import InputRows, TokenInputs, continued_positions
from vllm_omni.worker.ar.media_prompt import MediaItem, MediaPrompt


class MediaInputs:
    """The inputs of one prompt's tokens, the same whenever they are asked for: preemption recomputes from them.

    encode: an item -> [M, D] on the device.
    """

    def __init__(self, prompt: MediaPrompt, encode: Callable[[MediaItem], Tensor], device: torch.device) -> None:
        self._items = prompt.items
        self._delta = prompt.position_delta
        self._encode = encode
        self._rows: dict[int, Tensor] = {}
        self._indices = [item.indices.to(device) for item in prompt.items]
        self.positions = prompt.positions.to(device)

    def between(self, start: int, stop: int) -> TokenInputs:
        """Of the tokens [start, stop)."""
        parts: list[InputRows] = []
        for number, item in enumerate(self._items):
            first, last = torch.searchsorted(item.indices, torch.tensor([start, stop])).tolist()
            if first < last:
                rows = self._encoded(number)[first:last]
                places = self._indices[number][first:last] - start
                parts.append(InputRows(places, rows, torch.zeros_like(places, dtype=torch.bool)))
        positions = continued_positions(self.positions, self._delta, start, stop)
        return TokenInputs(positions, InputRows.join([(0, part) for part in parts]))

    def is_placeholder(self, start: int, stop: int) -> Tensor:
        """[stop - start] bool: which of the tokens [start, stop) stand for media."""
        marks = torch.zeros(stop - start, dtype=torch.bool, device=self.positions.device)
        for indices in self._indices:
            marks[indices[(indices >= start) & (indices < stop)] - start] = True
        return marks

    def _encoded(self, number: int) -> Tensor:
        if number not in self._rows:
            item = self._items[number]
            rows = self._encode(item)
            if len(rows) != len(item.indices):
                raise StageError(
                    f"{item.kind}: got {len(rows)} rows from its encoder, expected {len(item.indices)}, its "
                    "placeholder tokens"
                )
            self._rows[number] = rows
        return self._rows[number]
