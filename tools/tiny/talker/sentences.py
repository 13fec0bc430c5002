"""Sentences drawn anew for every step: any words in any order but the held-out ones, each written in one of its ways.

Legend: S sentences, n text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tools.tiny.speech.world import MAX_WORDS, WORDS, is_held_out
from tools.tiny.talker.spoken import PADDING, Spoken

LENGTH_WEIGHTS = (1.0, 1.0, 2.0, 4.0, 12.0)  # of one word to five: the longer, the more there is to learn
CAPITAL, FIGURES, COMMAS, STOPS = 0.3, 0.25, 0.25, 0.3  # shares of sentences written so


@dataclass(frozen=True, slots=True)
class Sentences:
    words: Tensor  # [S, MAX_WORDS] numbers, PADDING behind
    tokens: Tensor  # [S, n] of text, PADDING behind

    @classmethod
    def drawn(cls, spoken: Spoken, size: int) -> Sentences:
        words = drawn_words(spoken.known, size)
        return cls(words, written(spoken, words))


def drawn_words(known: Tensor, size: int, *, held_out: bool = False) -> Tensor:
    """Sentences that are held out, or that are not. known: the numbers of the words that may occur."""
    found: list[Tensor] = []
    while sum(map(len, found)) < size:
        words = known[torch.randint(len(known), (size, MAX_WORDS))]
        lengths = 1 + torch.multinomial(torch.tensor(LENGTH_WEIGHTS), size, replacement=True)
        words[torch.arange(MAX_WORDS) >= lengths[:, None]] = PADDING
        is_kept = [is_held_out(tuple(WORDS[word] for word in row if word >= 0)) for row in words.tolist()]
        found.append(words[torch.tensor(is_kept) == held_out])
    return torch.cat(found)[:size]


def written(spoken: Spoken, words: Tensor) -> Tensor:
    """[S, MAX_WORDS] -> text tokens, [S, n]."""
    size, is_word = len(words), words >= 0
    is_capital, has_figures, has_commas, has_stop = (
        torch.rand(size) < share for share in (CAPITAL, FIGURES, COMMAS, STOPS)
    )
    ways = torch.ones_like(words)  # of writing a word: see Spoken.spellings
    ways[:, 0] = torch.where(is_capital, 2, 0)
    tokens = spoken.spellings[words.clamp(min=0), ways, has_figures[:, None].long()]
    tokens = tokens.masked_fill(~is_word[..., None], PADDING)
    commas = torch.where(is_word & has_commas[:, None], spoken.comma, PADDING)
    commas[:, 0] = PADDING
    stops = torch.where(has_stop, spoken.stops[torch.randint(len(spoken.stops), (size,))], PADDING)
    return compact(torch.cat([torch.cat([commas[..., None], tokens], 2).flatten(1), stops[:, None]], 1))


def compact(rows: Tensor) -> Tensor:
    """The same numbers without the PADDING between them."""
    order = (rows < 0).long().sort(dim=1, stable=True).indices
    return rows.gather(1, order)[:, : int((rows >= 0).sum(1).max())]
