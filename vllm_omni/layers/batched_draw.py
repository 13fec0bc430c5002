"""Tokens of many rows drawn at once, each by its own settings and its own random number, on whatever device the logits
are.

A row's token is a function of its logits, settings and number alone: whatever is chosen among is told by values, never
by an order that ties could change. On two devices it is the same, unless rounding decides: where the number is
within about 1e-6 of the border between two tokens. Legend: B rows, V vocabulary, K kept by top_k, N chunks of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_omni.layers.native.vocabulary import find_top
from vllm_omni.utils.device import is_cpu, numbers_at_once, to_device

LEAST_TEMPERATURE = 1e-30  # a float32 that what is below the largest logit can be divided by
MOST = 1 - 2**-52  # a number that a sum may be multiplied with, and the product is below it
SHORT = 4096  # numbers of a row that are looked at one by one
CHUNK = 256  # numbers of a row that of a longer row are summed up first
MASS_BITS = 31  # of a float32 that is not negative


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """How one row is drawn."""

    temperature: float = 1.0  # 0: the largest logit
    top_k: int = 0  # 0: all; of equal logits the first ones
    top_p: float = (
        1.0  # the fewest of the most likely that reach it together, and what is as likely as the last of them
    )
    min_p: float = 0.0  # the least share of the largest probability


GREEDY = DrawSettings(temperature=0.0)


class BatchedDraw:
    """The settings of B rows, on the device."""

    def __init__(self, rows: Sequence[DrawSettings], vocab_size: int, device: torch.device) -> None:
        among, ranked = list[int](), list[int]()
        for place, row in enumerate(rows):
            if row.temperature > 0:
                (ranked if 0 < row.top_k < vocab_size else among).append(place)
        self._groups = [
            kind(rows, places, device) for kind, places in ((_DrawnAmongAll, among), (_DrawnByRank, ranked)) if places
        ]
        self._part = max(numbers_at_once(device) // vocab_size, 1)

    @property
    def draws(self) -> bool:
        """Whether some row is not greedy."""
        return bool(self._groups)

    def draw(self, logits: Tensor, uniforms: Tensor, largest: Tensor | None = None) -> Tensor:
        """logits: [B, V]; uniforms: [B] float64 in [0, 1), of those rows that are drawn; largest: [B] int64, of all
        others, where it is known -> [B] int64.
        """
        uniforms = uniforms.clamp_max(MOST)
        if len(self._groups) == 1 and self._groups[0].is_everyone:
            return self._drawn(self._groups[0], logits, uniforms)
        tokens = logits.argmax(-1) if largest is None else largest.clone()
        for group in self._groups:
            rows = group.rows
            tokens[rows] = self._drawn(group, logits[rows], uniforms[rows])
        return tokens

    def _drawn(self, group: _Group, logits: Tensor, uniforms: Tensor) -> Tensor:
        """So many rows at once as what is computed of them stays near, or within memory."""
        if len(logits) <= self._part:
            return group.draw(logits, uniforms, slice(None))
        parts = [slice(start, start + self._part) for start in range(0, len(logits), self._part)]
        return torch.cat([group.draw(logits[part], uniforms[part], part) for part in parts])


class _Group:
    """Rows that are drawn in one way. places: theirs."""

    def __init__(self, settings: Sequence[DrawSettings], places: list[int], device: torch.device) -> None:
        rows = [settings[place] for place in places]
        values = [(max(row.temperature, LEAST_TEMPERATURE), row.top_k, row.top_p, row.min_p) for row in rows]
        table = to_device(values, torch.float32, device)
        self.temperature, self.top_k, self.top_p, self.min_p = table.T[..., None].unbind()  # [B, 1] each
        self.is_everyone = len(places) == len(settings)
        self.rows = slice(None) if self.is_everyone else to_device(places, torch.int64, device)
        self.cuts_mass = any(row.top_p < 1 for row in rows)
        self.cuts_small = any(row.min_p for row in rows)

    def draw(self, logits: Tensor, uniforms: Tensor, part: slice) -> Tensor:
        """[B] int64. part: which rows of the group these are."""
        raise NotImplementedError


class _DrawnAmongAll(_Group):
    """In the order of the vocabulary."""

    def draw(self, logits: Tensor, uniforms: Tensor, part: slice) -> Tensor:
        probabilities = _probabilities(logits, logits.amax(-1, keepdim=True), self.temperature[part])
        if self.cuts_mass or self.cuts_small:
            least = self.min_p[part] * probabilities.amax(-1, keepdim=True)
            if self.cuts_mass:
                least = torch.maximum(least, least_of_mass(probabilities, self.top_p[part]))
            probabilities.masked_fill_(probabilities < least, 0)
        cumulated = Cumulated(probabilities)
        return cumulated.find(uniforms[:, None] * cumulated.total)


class _DrawnByRank(_Group):
    """The most likely first: which rank, is known without looking at all others."""

    def __init__(self, settings: Sequence[DrawSettings], places: list[int], device: torch.device) -> None:
        super().__init__(settings, places, device)
        self._most = max(settings[place].top_k for place in places)

    def draw(self, logits: Tensor, uniforms: Tensor, part: slice) -> Tensor:
        found = find_top(logits, self._most)
        values, places = logits.topk(self._most) if found is None else found
        ranks = torch.arange(self._most, device=logits.device)
        scores = values.float().masked_fill(ranks >= self.top_k[part], -torch.inf)
        probabilities = _probabilities(scores, scores[:, :1], self.temperature[part])
        before = probabilities.cumsum(-1) - probabilities
        is_out = (before >= self.top_p[part]) | (probabilities < self.min_p[part] * probabilities[:, :1])
        cumulated = probabilities.masked_fill_(is_out, 0).cumsum(-1, dtype=torch.float64)
        threshold = uniforms[:, None] * cumulated[:, -1:]
        rank = torch.searchsorted(cumulated, threshold, right=True).clamp_max_(self._most - 1)
        tokens = places.gather(1, rank).squeeze(1)
        if found is not None:
            return tokens
        value = values.gather(1, rank)
        num_before = ((values == value) & (ranks < rank)).sum(-1, keepdim=True)  # equal ones of a lower rank
        if not is_cpu(logits.device):
            return Cumulated(logits == value).find(num_before.double())
        # which of equal logits come first is left open by topk
        is_one_of_many = (((values == value).sum(-1, keepdim=True) > 1) | (value == values[:, -1:])).squeeze(1)
        if is_one_of_many.any():
            equal = Cumulated(logits[is_one_of_many] == value[is_one_of_many])
            tokens[is_one_of_many] = equal.find(num_before[is_one_of_many].double())
        return tokens


class Cumulated:
    """Sums of numbers that are not negative, from the left on; of long rows in two steps. weights: [B, V]."""

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights
        self._size = size = weights.shape[-1]
        self._sums = weights
        if size > SHORT:
            whole = size // CHUNK * CHUNK
            dtype = torch.int32 if weights.dtype == torch.bool else torch.float64
            self._sums = weights[:, :whole].unflatten(-1, (-1, CHUNK)).sum(-1, dtype=dtype)  # [B, N]
            if whole < size:
                rest = weights[:, whole:].sum(-1, keepdim=True, dtype=dtype)
                self._sums = torch.cat((self._sums, rest), dim=-1)
        self._ends = self._sums.cumsum(-1, dtype=torch.float64)
        self.total = self._ends[:, -1:]

    def find(self, threshold: Tensor) -> Tensor:
        """threshold: [B, 1] float64, at least 0 and below the total -> [B]: the first place where the sum is above
        it.
        """
        place = torch.searchsorted(self._ends, threshold, right=True).clamp_max_(self._sums.shape[-1] - 1)
        if self._size > SHORT:
            rest = threshold - (self._ends.gather(1, place) - self._sums.gather(1, place))
            place = self._find_within(place * CHUNK, rest)
        return place.squeeze(1)

    def _find_within(self, start: Tensor, threshold: Tensor) -> Tensor:
        """The same within the chunk that begins there; the last place with a weight, where rounding has carried the
        threshold behind it.
        """
        places = start + torch.arange(CHUNK, device=start.device)
        weights = self._weights.gather(1, places.clamp_max(self._size - 1)).masked_fill_(places >= self._size, 0)
        cumulated = weights.cumsum(-1, dtype=torch.float64)
        total = cumulated[:, -1:]
        threshold = torch.minimum(threshold, total.nextafter(torch.zeros_like(total)))
        return (start + torch.searchsorted(cumulated, threshold, right=True)).clamp_max_(self._size - 1)


def least_of_mass(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """[B, V] float32, of sum 1, and [B, 1] -> [B, 1]: the smallest of the fewest probabilities that reach top_p
    together; 0 where it is 1.
    """
    least = (_sorted_least if is_cpu(probabilities.device) else bisected_least)(probabilities, top_p)
    return least.masked_fill(top_p >= 1, 0)


def _sorted_least(probabilities: Tensor, top_p: Tensor) -> Tensor:
    rows = zip(probabilities, top_p.squeeze(1).tolist(), strict=True)
    return torch.stack([_sorted_least_of_row(row, mass) for row, mass in rows])[:, None]


def _sorted_least_of_row(probabilities: Tensor, top_p: float) -> Tensor:
    """Most of a row is too unlikely to be kept, and need not be sorted: what is below this share has together less than
    half of the mass that may be left out.
    """
    if top_p >= 1:
        return probabilities.new_zeros(())
    share = (1 - top_p) / (2 * len(probabilities))
    for some in (probabilities[probabilities > share], probabilities):
        ordered = some.sort(descending=True).values
        reached = ordered.cumsum(-1)
        if len(ordered) and reached[-1] > top_p + (1 - top_p) / 4:  # nothing behind these would be kept
            break
    return ordered.masked_fill_(reached - ordered >= top_p, torch.inf).amin(-1)


def bisected_least(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """By halves of what a float32 can be: what is not negative has the order of its bits as an integer. A sort of many
    long rows takes an accelerator several times as long.
    """
    bits = torch.zeros_like(top_p, dtype=torch.int32)
    for bit in reversed(range(MASS_BITS - 1)):  # the highest is of numbers from 2 on
        higher = bits | (1 << bit)
        is_counted = probabilities >= higher.view(torch.float32)
        mass = probabilities.masked_fill(~is_counted, 0).sum(-1, keepdim=True)
        bits = torch.where(mass >= top_p, higher, bits)
    return bits.view(torch.float32)


def _probabilities(logits: Tensor, largest: Tensor, temperature: Tensor) -> Tensor:
    """Of [B, V], float32 in new memory; largest: [B, 1]."""
    return logits.float().sub(largest).div_(temperature).softmax(-1)
