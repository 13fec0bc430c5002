"""The hidden states of one sequence that somebody reads, and positions and tokens of its prompt: whole when all is
computed, or each row once, as soon as it is computed. Prefix hits and preemption make no difference.

Legend: T prompt tokens that are given, n tokens, L layers of a port, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_omni.core.ar.sequence import Sequence
from vllm_omni.engine.base import ReadPorts
from vllm_omni.messages import StageRows
from vllm_omni.worker.ar.media_inputs import MediaInputs
from vllm_omni.worker.ar.model_runner import ModelRunner

POSITIONS, TOKENS = "prompt_positions", "prompt_token_ids"
PROMPT_FACTS = frozenset({POSITIONS, TOKENS})  # ports that need no computation


@dataclass(frozen=True, slots=True)
class TappedPort:
    """A Tap, its layers counted from the start."""

    layers: tuple[int, ...]
    tokens: str


class TappedStates:
    """Gives what `reads` names of these ports. media: the prompt's, whose placeholders have no embedding of their own,
    so that zeros stand there.
    """

    def __init__(
        self,
        sequence: Sequence,
        ports: Mapping[str, TappedPort],
        reads: ReadPorts,
        runner: ModelRunner,
        media: MediaInputs | None,
        num_dropped: int = 0,
    ) -> None:
        """num_dropped: first tokens of the prompt of which nothing is given."""
        self._sequence = sequence
        self._ports = {port: tap for port, tap in ports.items() if port in reads}
        self._reads = reads
        self.are_streamed = bool(reads.streamed)  # whether `rows` can have any
        self._runner = runner
        self._media = media
        self._num_dropped = num_dropped
        self._sent = {port: self._start(tap) for port, tap in self._ports.items()}  # the first token not given yet
        self._closed: set[str] = set()

    def rows(self, is_over: bool) -> list[StageRows]:
        """What is new of the streamed ports since the last call. is_over: whether nothing of the sequence is left to
        compute. A port that turns out to have no row says so.
        """
        events: list[StageRows] = []
        request_id = self._sequence.request_id
        for port in sorted(PROMPT_FACTS & self._reads.streamed - self._closed):
            self._closed.add(port)
            events.append(StageRows(request_id, port, self._fact(port), is_last=True))
        for port, tap in self._ports.items():
            if port not in self._reads.streamed or port in self._closed:
                continue
            start, stop = self._sent[port], self._stop(tap)
            is_last = self._is_whole(tap, stop, is_over)
            if start < stop or is_last:
                self._sent[port] = stop
                self._closed.update([port] if is_last else ())
                events.append(StageRows(request_id, port, self._states(tap, start, stop), is_last))
        return events

    def tensors(self) -> dict[str, Tensor]:
        """The ports that are read whole, when all is computed."""
        found = {port: self._fact(port) for port in sorted(PROMPT_FACTS & self._reads.whole)}
        for port, tap in self._ports.items():
            if port in self._reads.whole:
                found[port] = self._states(tap, self._start(tap), self._stop(tap))
        return found

    def _start(self, tap: TappedPort) -> int:
        return self._num_dropped if tap.tokens == "prompt" else self._sequence.num_prompt_tokens

    def _stop(self, tap: TappedPort) -> int:
        """Behind the last token that is computed and belongs to the port for certain."""
        sequence = self._sequence
        computed, num_prompt = sequence.num_computed_tokens, sequence.num_prompt_tokens
        if tap.tokens == "prompt":
            return min(computed, num_prompt)
        if tap.tokens == "followed" and not sequence.is_writing:  # nothing follows the last token
            computed = min(computed, sequence.num_tokens - 1)
        return max(num_prompt, computed)

    def _is_whole(self, tap: TappedPort, stop: int, is_over: bool) -> bool:
        sequence = self._sequence
        if tap.tokens == "prompt":
            return stop == sequence.num_prompt_tokens
        if tap.tokens == "followed":
            return sequence.num_tokens > sequence.num_prompt_tokens and not sequence.is_writing
        return is_over

    def _fact(self, port: str) -> Tensor:
        """[T, 3] positions, or [T] token ids."""
        if port == POSITIONS:
            return self._positions()
        prompt = self._sequence.token_ids[self._num_dropped : self._sequence.num_prompt_tokens]
        return torch.tensor(prompt, dtype=torch.int64, device=self._runner.device)

    def _positions(self) -> Tensor:
        """[T, 3]: int64, or float32 where time is not counted in whole numbers."""
        if self._media is not None:
            return self._media.positions.T[self._num_dropped :].contiguous()
        stop = self._sequence.num_prompt_tokens
        return torch.arange(self._num_dropped, stop, device=self._runner.device)[:, None].repeat(1, 3)

    def _states(self, tap: TappedPort, start: int, stop: int) -> Tensor:
        """[n, L D] of the tokens [start, stop)."""
        states = self._runner.tapped_states(self._sequence, tap.layers, start, stop)
        if self._media is not None and 0 in tap.layers:
            is_placeholder = self._media.is_placeholder(start, stop)
            width = states.shape[1] // len(tap.layers)
            for column, layer in enumerate(tap.layers):
                if layer == 0:
                    states[is_placeholder, column * width : (column + 1) * width] = 0
        return states
