"""What a talker is fed: a prompt's rows in the place of its tokens, then, joined to each code that it writes, one row
of the text after the other, and padding for ever.

Legend: T prompt tokens, E width. Token T + j is the code written at place j, and reads text row j.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_omni.layers.token_inputs import InputRows, TokenInputs, continued_positions


@dataclass(frozen=True, slots=True, eq=False)
class TextRows:
    """What stands around a text: embeddings [E]."""

    before: tuple[Tensor, ...]
    behind: tuple[Tensor, ...]
    pad: Tensor  # then, for ever


class TalkerInputs:
    """The inputs of one sequence whose text may still be written, the same whenever they are asked for.

    prompt: [T, E]; positions: [3, T], where tokens have positions of their own; all on the device.
    """

    def __init__(self, prompt: Tensor, text: TextRows, positions: Tensor | None = None) -> None:
        self._prompt = prompt
        self._positions = positions
        self._delta = 0 if positions is None else positions.max().item() + 1 - len(prompt)
        self._text = text
        self._rows: list[Tensor] = list(text.before)
        self._joined: list[Tensor] = []  # what further codes of each place add
        self._is_whole = False
        self._written = torch.zeros(1, dtype=torch.int64, device=prompt.device)  # the index of a token that comes alone
        self._joins = torch.ones(1, dtype=torch.bool, device=prompt.device)

    def extend(self, rows: Iterable[Tensor], is_last: bool) -> None:
        """The next rows [E] of the text; is_last: there will be no more."""
        self._rows.extend(rows)
        self._is_whole = is_last
        if is_last:
            self._rows.extend(self._text.behind)

    def join(self, row: Tensor) -> None:
        """What is added [E] to the next place besides its code and its text; for all places or for none."""
        self._joined.append(row)

    @property
    def num_ready_tokens(self) -> int | None:
        """How many tokens have their rows; None for however many there may be."""
        return None if self._is_whole else len(self._prompt) + len(self._rows)

    def between(self, start: int, stop: int) -> TokenInputs:
        """Of the tokens [start, stop), whose rows are there."""
        num_prompt = len(self._prompt)
        if start >= num_prompt and stop - start == 1:
            rows = InputRows(self._written, self._row(start - num_prompt)[None], self._joins)
            return TokenInputs(self._positions_of(start, stop), rows)
        own = [self._row(token - num_prompt)[None] for token in range(max(start, num_prompt), stop)]
        embedded = torch.cat([self._prompt[start:stop], *own])
        indices = torch.arange(stop - start, device=embedded.device)
        joins = InputRows(indices, embedded, indices + start >= num_prompt)
        return TokenInputs(self._positions_of(start, stop), joins)

    def _positions_of(self, start: int, stop: int) -> Tensor | None:
        if self._positions is None:
            return None
        return continued_positions(self._positions, self._delta, start, stop)

    def _row(self, place: int) -> Tensor:
        assert self._is_whole or place < len(self._rows), "a token was computed before its row was there"
        row = self._rows[place] if place < len(self._rows) else self._text.pad
        return row + self._joined[place] if self._joined else row
