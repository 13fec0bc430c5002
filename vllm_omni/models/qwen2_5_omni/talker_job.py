"""One reply on its way through a talker: the thinker's rows as they come, the sequence that reads them, and its
codes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from vllm_omni.core.ar.sequence import Sequence
from vllm_omni.engine.ar.base import Generation
from vllm_omni.engine.ar.talker.inputs import TalkerInputs, TextRows
from vllm_omni.engine.ar.talker.job import CodesJob
from vllm_omni.engine.ar.talker.ports import StreamedRows
from vllm_omni.engine.ar.tapped_states import POSITIONS
from vllm_omni.errors import StageError
from vllm_omni.messages import ChunkConsumed, StageEvent, StageTask
from vllm_omni.payload import StreamChunk

PROMPT, REPLY = "prompt_states", "reply_states"
PORTS = frozenset({PROMPT, REPLY, POSITIONS})


class TalkerJob(CodesJob):
    """A reply without a row (one token, or none) is not spoken: no codes.

    begin: makes the generation after a prompt of this many tokens, when the first reply row is there. width: E, half
    of a row of states. gives_rows and gives_codes: whether codes are read one by one, and whole.
    """

    def __init__(
        self,
        task: StageTask,
        begin: Callable[[int], Generation],
        text: TextRows,
        width: int,
        gives_rows: bool,
        gives_codes: bool,
    ) -> None:
        super().__init__(task, gives_rows, gives_codes)
        self._begin = begin
        self._text = text
        self._ports = {
            PROMPT: StreamedRows(PROMPT, 2 * width),
            POSITIONS: StreamedRows(POSITIONS, 3),
            REPLY: StreamedRows(REPLY, 2 * width),
        }
        self._unused: deque[int] = deque()  # reply rows up to which each chunk goes that is not consumed

    def feed(self, port: str, chunk: StreamChunk) -> list[StageEvent]:
        if port not in self._ports:
            raise StageError(f"stage input {port!r} is not streamed")
        rows = self._ports[port].accept(chunk)
        events: list[StageEvent] = []
        if port == REPLY:
            self._unused.append(self._ports[REPLY].num_rows)
            if self._inputs is not None:
                self._inputs.extend(self._summed(rows), chunk.is_last)
                self._ports[REPLY].parts.clear()
        else:
            events.append(ChunkConsumed(self.task.request_id, port))
        if self._inputs is None and self._has_begin:
            self._start_speaking()
        if self._generation is not None and self._inputs is not None:
            self._generation.sequence.num_ready_tokens = self._inputs.num_ready_tokens
        return events

    def codes(self, start: int, stop: int) -> Tensor:
        written = [] if self._is_silent else self._started.sequence.output_token_ids[start:stop]
        return torch.tensor(written, dtype=torch.int64, device=self._text.pad.device)

    @property
    def _has_begin(self) -> bool:
        prompt, positions, reply = (self._ports[port] for port in (PROMPT, POSITIONS, REPLY))
        return prompt.is_whole and positions.is_whole and (reply.is_whole or reply.num_rows > 0)

    def _start_speaking(self) -> None:
        prompt, positions, reply = (self._ports[port] for port in (PROMPT, POSITIONS, REPLY))
        if prompt.num_rows != positions.num_rows or not prompt.num_rows:
            raise StageError(
                f"stage inputs: got {prompt.num_rows} rows of {PROMPT!r} and {positions.num_rows} of {POSITIONS!r}, "
                "expected one of each for every prompt token"
            )
        if not reply.num_rows:
            self._is_silent = True
            return
        self._generation = self._begin(prompt.num_rows)
        places = torch.cat(positions.parts).to(self._text.pad.device).T
        self._inputs = TalkerInputs(self._summed(torch.cat(prompt.parts)), self._text, places)
        self._inputs.extend(self._summed(torch.cat(reply.parts)), reply.is_whole)
        for port in (prompt, positions, reply):
            port.parts.clear()
        self.sequences.append(self._generation.sequence)

    def _summed(self, rows: Tensor) -> Tensor:
        """[n, 2 E] -> [n, E]: embedding and state."""
        embeddings, states = rows.to(self._text.pad).chunk(2, dim=-1)
        return embeddings + states

    def consumed(self, sequence: Sequence) -> list[StageEvent]:
        """Chunks of the reply all of whose rows have been read."""
        num_read = sequence.num_reached_tokens - (sequence.num_prompt_tokens - 1)
        events: list[StageEvent] = []
        while self._unused and self._unused[0] <= num_read:
            self._unused.popleft()
            events.append(ChunkConsumed(sequence.request_id, REPLY))
        return events
