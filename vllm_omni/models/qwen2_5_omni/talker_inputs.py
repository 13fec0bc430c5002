"""What a talker is fed beside its codes: the thinker's prompt in their place, then, joined to each code, the begin of
the voice, one row of the reply after the other, the end of the text, and padding for ever.

Legend: T prompt tokens, R reply rows, E width. Token T is the voice's, token T + 1 + j reads reply row j.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_omni.layers.token_inputs import InputRows, TokenInputs, continued_positions


@dataclass(frozen=True, slots=True, eq=False)
class TextRows:
    """Embeddings [E] of the thinker: the voice's first token, the end of a text, padding."""

    bos: Tensor
    end: Tensor
    pad: Tensor


class TalkerInputs:
    """The inputs of one reply that is still being written, the same whenever they are asked for.

    prompt: [T, E], embedding and state summed; positions: [3, T] int64; both on the device.
    """

    def __init__(self, prompt: Tensor, positions: Tensor, text: TextRows) -> None:
        self._prompt = prompt
        self._positions = positions
        self._delta = int(positions.max()) + 1 - len(prompt)
        self._text = text
        self._reply: list[Tensor] = []
        self._is_whole = False

    def extend(self, rows: Iterable[Tensor], is_last: bool) -> None:
        """The next reply rows [E]; is_last: there will be no more."""
        self._reply.extend(rows)
        self._is_whole = is_last

    @property
    def num_ready_tokens(self) -> int | None:
        """How many tokens have their rows; None for however many there may be."""
        return None if self._is_whole else len(self._prompt) + 1 + len(self._reply)

    def between(self, start: int, stop: int) -> TokenInputs:
        """Of the tokens [start, stop), whose rows are there."""
        num_prompt = len(self._prompt)
        own = [self._row(token - num_prompt - 1)[None] for token in range(max(start, num_prompt), stop)]
        rows = torch.cat([self._prompt[start:stop], *own])
        indices = torch.arange(stop - start, device=rows.device)
        positions = continued_positions(self._positions, self._delta, start, stop)
        return TokenInputs(positions, InputRows(indices, rows, indices + start >= num_prompt))

    def _row(self, number: int) -> Tensor:
        """The row of reply place `number`; -1 is the voice's."""
        if number < 0:
            return self._text.bos
        if number < len(self._reply):
            return self._reply[number]
        assert self._is_whole, "a token was computed before its row was there"
        return self._text.end if number == len(self._reply) else self._text.pad
