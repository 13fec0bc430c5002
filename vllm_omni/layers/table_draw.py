"""Tokens of many rows drawn at once by settings that stand in a tensor: a graph that has captured it draws by whatever
stands there when it is replayed.

A row's token is a function of its logits, settings and number alone: whatever is chosen among is told by values, never
by an order that ties could change. Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_omni.layers.batched_draw import LEAST_TEMPERATURE, MOST, Cumulated, DrawSettings, least_of_mass

NUM_SETTINGS = 4
LEAST_TOP_P = 1e-30  # a float32 above 0, which the most likely token reaches


class TableDraw:
    """table: [NUM_SETTINGS, B] float64 on the device, as of `settings_table`. rows: the same, so that what none of them
    asks for is left out; None: whatever may stand in the table by then: what is computed depends on shapes alone.
    """

    def __init__(self, table: Tensor, vocab_size: int, rows: Sequence[DrawSettings] | None = None) -> None:
        self._temperature, self._top_p = table[:2, :, None].float().unbind()
        self._is_greedy, self._last_kept = table[2] > 0, table[3, :, None].long()
        kept = [vocab_size, 1] if rows is None else [num_kept(row, vocab_size) for row in rows]
        self._most_kept, self._keeps_all = max(kept), min(kept) == vocab_size
        self._draws = rows is None or any(row.temperature > 0 for row in rows)
        self._has_greedy = rows is None or any(row.temperature == 0 for row in rows)
        self._cuts_mass = rows is None or any(row.top_p < 1 for row in rows)

    def draw(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """logits: [B, V]; uniforms: [B] float64 in [0, 1) -> [B] int64."""
        if not self._draws:
            return logits.argmax(-1)
        scores = logits.float() / self._temperature
        if not self._keeps_all:
            least = scores.topk(self._most_kept).values.gather(1, self._last_kept)
            scores = scores.masked_fill(scores < least, -torch.inf)
        probabilities = scores.softmax(-1)
        if self._cuts_mass:
            probabilities = probabilities.masked_fill(probabilities < least_of_mass(probabilities, self._top_p), 0)
        cumulated = Cumulated(probabilities)
        drawn = cumulated.find(uniforms[:, None].clamp_max(MOST) * cumulated.total)
        return torch.where(self._is_greedy, logits.argmax(-1), drawn) if self._has_greedy else drawn


def settings_table(rows: Sequence[DrawSettings], vocab_size: int) -> npt.NDArray[np.float64]:
    """[NUM_SETTINGS, B]: temperature, top_p, whether the largest logit is taken, how many may be drawn, less one."""
    values = [
        (
            max(row.temperature, LEAST_TEMPERATURE) if row.temperature else 1.0,
            max(row.top_p, LEAST_TOP_P),
            row.temperature == 0,
            num_kept(row, vocab_size) - 1,
        )
        for row in rows
    ]
    return np.array(values, dtype=np.float64).T


def num_kept(row: DrawSettings, vocab_size: int) -> int:
    """Of the vocabulary, by top_k."""
    return min(row.top_k or vocab_size, vocab_size)
