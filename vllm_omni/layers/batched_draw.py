"""Tokens of many rows drawn at once, each by its own settings and its own random numbers.

A row's token is a function of its logits, settings and number alone: whatever is chosen among is told by values, never
by an order that ties could change. Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """How one row is drawn."""

    temperature: float = 1.0  # 0: the largest logit
    top_k: int = 0  # 0: all
    top_p: float = 1.0


class BatchedDraw:
    """The settings of B rows, on the device."""

    def __init__(self, rows: Sequence[DrawSettings], vocab_size: int, device: torch.device) -> None:
        kept = [min(row.top_k or vocab_size, vocab_size) for row in rows]
        values = [
            [row.temperature or 1.0, row.top_p, row.temperature == 0, most - 1]
            for row, most in zip(rows, kept, strict=True)
        ]
        table = torch.tensor(values, dtype=torch.float32, device=device)
        self._temperature, self._top_p, greedy, last = table.T[..., None].unbind()
        self._is_greedy, self._last_kept = greedy.squeeze(-1).bool(), last.long()
        self._most_kept = max(kept)
        self._keeps_all = min(kept) == vocab_size
        self._draws = any(row.temperature > 0 for row in rows)
        self._has_greedy = any(row.temperature == 0 for row in rows)
        self._cuts_mass = any(row.top_p < 1 for row in rows)

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
            probabilities = probabilities.masked_fill(probabilities < self._least_of_mass(probabilities), 0)
        cumulated = probabilities.double().cumsum(-1)
        total = cumulated[:, -1:]
        # rounding may carry the product to the very end, behind the last token that can be drawn
        threshold = torch.minimum(uniforms[:, None] * total, total.nextafter(torch.zeros_like(total)))
        drawn = torch.searchsorted(cumulated, threshold, right=True).squeeze(1)
        return torch.where(self._is_greedy, logits.argmax(-1), drawn) if self._has_greedy else drawn

    def _least_of_mass(self, probabilities: Tensor) -> Tensor:
        """[B, 1]: the smallest of the fewest probabilities that reach top_p together."""
        ordered = probabilities.sort(descending=True).values
        is_kept = ordered.cumsum(-1) - ordered < self._top_p
        least = ordered.masked_fill(~is_kept, torch.inf).amin(-1, keepdim=True)
        return least.masked_fill(self._top_p >= 1, 0)
