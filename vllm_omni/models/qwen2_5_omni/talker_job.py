"""One reply on its way through a talker: the thinker's rows as they come, the sequence that reads them, and its
codes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_omni.core.ar.scheduler import Chunk
from vllm_omni.core.ar.sequence import Sequence
from vllm_omni.engine.ar.base import ARJob, Generation
from vllm_omni.engine.ar.tapped_states import POSITIONS
from vllm_omni.errors import StageError
from vllm_omni.layers.sampler import SampledToken, SamplingRow
from vllm_omni.layers.token_inputs import TokenInputs
from vllm_omni.messages import ChunkConsumed, StageEvent, StageProgress, StageRows, StageTask
from vllm_omni.models.qwen2_5_omni.talker_inputs import TalkerInputs, TextRows
from vllm_omni.payload import StreamChunk

PROMPT, REPLY = "prompt_states", "reply_states"
PORTS = frozenset({PROMPT, REPLY, POSITIONS})
CODES = "codes"


class _Port:
    """One streamed input: rows so far, of the right shape. Their order is the sender's."""

    def __init__(self, name: str, width: int) -> None:
        self.parts: list[Tensor] = []
        self.num_rows = 0
        self.is_whole = False
        self._name = name
        self._width = width

    def accept(self, chunk: StreamChunk) -> Tensor:
        """The chunk's new rows."""
        rows = chunk.new_rows
        if rows.ndim != 2 or rows.shape[1] != self._width:
            raise StageError(
                f"stage input {self._name!r}: got rows {list(rows.shape)}, expected [n, {self._width}]; does the edge "
                "come from a stage of the same checkpoint?"
            )
        self.num_rows += len(rows)
        self.is_whole = chunk.is_last
        self.parts.append(rows)
        return rows


class TalkerJob(ARJob):
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
        super().__init__(task)
        self._begin = begin
        self._text = text
        self._ports = {PROMPT: _Port(PROMPT, 2 * width), POSITIONS: _Port(POSITIONS, 3), REPLY: _Port(REPLY, 2 * width)}
        self._gives_rows, self._gives_codes = gives_rows, gives_codes
        self._inputs: TalkerInputs | None = None
        self._generation: Generation | None = None
        self._is_silent = False  # there is no reply to be spoken
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

    def inputs_of(self, chunk: Chunk) -> TokenInputs | None:
        return None if self._inputs is None else self._inputs.between(chunk.start, chunk.end)

    def row_of(self, sequence: Sequence) -> SamplingRow:
        return self._started.row

    def record(self, sequence: Sequence, token: SampledToken | None) -> list[StageEvent]:
        events = self._consumed(sequence)
        if token is None:
            return events
        generation, code = self._started, token.token_id
        generation.write(code)
        events.append(StageProgress(sequence.request_id, generation.num_written, generation.max_new_tokens))
        if self._gives_rows and generation.finish_reason != "stop":
            events.append(StageRows(sequence.request_id, CODES, self._codes([code])))
        return events

    @property
    def is_done(self) -> bool:
        return self._is_silent or (self._generation is not None and self._generation.finish_reason is not None)

    def is_over(self, sequence: Sequence) -> bool:
        return self.is_done

    def tensors(self) -> dict[str, Tensor]:
        return {CODES: self._codes(self._written())} if self._gives_codes else {}

    def meta(self) -> dict[str, Any]:
        if self._is_silent:
            return {"finish_reason": "stop", "prompt_tokens": 0}
        generation = self._started
        return {
            "finish_reason": generation.finish_reason,
            "prompt_tokens": generation.sequence.num_prompt_tokens,
        }

    def metrics(self) -> dict[str, int]:
        if self._is_silent:
            return dict.fromkeys(("steps", "tokens", "prompt_tokens", "cache_hits", "preemptions"), 0)
        sequence = self._started.sequence
        return {
            "steps": self.num_steps,
            "tokens": len(sequence.output_token_ids),
            "prompt_tokens": sequence.num_prompt_tokens,
            "cache_hits": 0,
            "preemptions": sequence.num_preemptions,
        }

    @property
    def _started(self) -> Generation:
        assert self._generation is not None
        return self._generation

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
        places = torch.cat(positions.parts).to(self._text.bos.device).T
        self._inputs = TalkerInputs(self._summed(torch.cat(prompt.parts)), places, self._text)
        self._inputs.extend(self._summed(torch.cat(reply.parts)), reply.is_whole)
        for port in (prompt, positions, reply):
            port.parts.clear()
        self.sequences.append(self._generation.sequence)

    def _summed(self, rows: Tensor) -> Tensor:
        """[n, 2 E] -> [n, E]: embedding and state."""
        embeddings, states = rows.to(self._text.bos).chunk(2, dim=-1)
        return embeddings + states

    def _consumed(self, sequence: Sequence) -> list[StageEvent]:
        """Chunks of the reply all of whose rows have been read."""
        num_read = sequence.num_reached_tokens - (sequence.num_prompt_tokens - 1)
        events: list[StageEvent] = []
        while self._unused and self._unused[0] <= num_read:
            self._unused.popleft()
            events.append(ChunkConsumed(sequence.request_id, REPLY))
        return events

    def _written(self) -> list[int]:
        if self._is_silent:
            return []
        written = self._started.sequence.output_token_ids
        return written[:-1] if self._started.finish_reason == "stop" else written

    def _codes(self, codes: list[int]) -> Tensor:
        return torch.tensor(codes, dtype=torch.int64, device=self._text.bos.device)
