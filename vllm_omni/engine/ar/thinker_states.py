"""The states of one thinker's sequence on their way to a talker: rows of [embedding, last state after the norm] and
positions, each given once, as soon as it is computed. Prefix hits and preemption make no difference.

Legend: T prompt tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many

import torch
from torch import Tensor

from vllm_omni.core.ar.sequence import Sequence
from vllm_omni.engine.ar.options import STATE_PORTS
from vllm_omni.engine.base import StageRows
from vllm_omni.worker.ar.media_inputs import MediaInputs

PROMPT, REPLY = STATE_PORTS
POSITIONS = "prompt_positions"
StateReader = Callable[[Sequence, Many[int], int, int], Tensor]


class ThinkerStates:
    """layers: the indices of embeddings and last states. wanted and streamed: the ports that somebody reads. media:
    whose placeholder tokens have no embedding of their own, so that zeros stand there.
    """

    def __init__(
        self,
        sequence: Sequence,
        layers: tuple[int, ...],
        wanted: frozenset[str],
        streamed: frozenset[str],
        media: MediaInputs | None,
        device: torch.device,
    ) -> None:
        self._sequence = sequence
        self._layers = layers
        self._wanted = wanted
        self._streamed = streamed
        self._media = media
        self._device = device
        self._sent = {PROMPT: 0, REPLY: sequence.num_prompt_tokens}  # the first token that has not been given yet
        self._has_sent_positions = False
        self._closed: set[str] = set()

    def rows(self, read: StateReader) -> list[StageRows]:
        """What is new since the last call, a written token taken in; a reply of one word has no row, and says so.
        read: states of computed tokens, as ModelRunner.tapped_states.
        """
        events: list[StageRows] = []
        request_id = self._sequence.request_id
        if POSITIONS in self._streamed and not self._has_sent_positions:
            self._has_sent_positions = True
            events.append(StageRows(request_id, POSITIONS, self._positions(), is_last=True))
        for port, stop in self._ends().items():
            start = self._sent[port]
            is_last = self._is_whole(port, stop)
            if port in self._streamed and port not in self._closed and (start < stop or is_last):
                self._sent[port] = stop
                self._closed.update([port] if is_last else ())
                events.append(StageRows(request_id, port, self._states(read, start, stop), is_last))
        return events

    def tensors(self, read: StateReader) -> dict[str, Tensor]:
        """The ports that are wanted whole, when all is computed."""
        found = {POSITIONS: self._positions()} if POSITIONS in self._wanted else {}
        starts = {PROMPT: 0, REPLY: self._sequence.num_prompt_tokens}
        for port, stop in self._ends().items():
            if port in self._wanted:
                found[port] = self._states(read, starts[port], stop)
        return found

    def _is_whole(self, port: str, stop: int) -> bool:
        if port == PROMPT:
            return stop == self._sequence.num_prompt_tokens
        return self._sequence.num_tokens > self._sequence.num_prompt_tokens and not self._sequence.is_writing

    def _ends(self) -> dict[str, int]:
        sequence = self._sequence
        computed, num_prompt = sequence.num_computed_tokens, sequence.num_prompt_tokens
        num_fed = sequence.num_tokens - (0 if sequence.is_writing else 1)  # nothing follows the last token
        return {PROMPT: min(computed, num_prompt), REPLY: max(num_prompt, min(computed, num_fed))}

    def _positions(self) -> Tensor:
        """[T, 3] int64."""
        if self._media is not None:
            return self._media.positions.T.contiguous()
        return torch.arange(self._sequence.num_prompt_tokens, device=self._device)[:, None].repeat(1, 3)

    def _states(self, read: StateReader, start: int, stop: int) -> Tensor:
        """[stop - start, 2 D]"""
        states = read(self._sequence, self._layers, start, stop)
        if self._media is not None:
            width = states.shape[1] // 2
            states[self._media.is_placeholder(start, stop), :width] = 0
        return states
