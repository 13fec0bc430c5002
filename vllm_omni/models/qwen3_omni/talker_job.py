"""One reply on its way through the talker: the thinker's rows as they come, the sequence that reads them, and its
frames.

Legend: E width of the thinker's states. The assistant's turn is the end of the prompt and the reply together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from vllm_omni.core.ar.sequence import Sequence
from vllm_omni.engine.ar.base import Generation
from vllm_omni.engine.ar.talker.frames import FramesJob
from vllm_omni.engine.ar.talker.inputs import TalkerInputs
from vllm_omni.engine.ar.talker.ports import StreamedRows
from vllm_omni.engine.ar.tapped_states import POSITIONS, TOKENS
from vllm_omni.errors import StageError
from vllm_omni.messages import ChunkConsumed, StageEvent, StageTask
from vllm_omni.models.qwen3_omni.talker_config import TalkerConfig
from vllm_omni.models.qwen3_omni.talker_prompt import NUM_TEXT_BEFORE, HeardPrompt, hear
from vllm_omni.models.qwen3_omni.talker_rows import TalkerRows
from vllm_omni.payload import StreamChunk
from vllm_omni.worker.ar.frames.frame_writer import FrameDraw

PROMPT, REPLY = "prompt_states", "reply_states"
PORTS = frozenset({PROMPT, REPLY, POSITIONS, TOKENS})


class TalkerJob(FramesJob):
    """A reply without a row (one token, or none) is not spoken: no codes.

    begin: makes the generation after a prompt of this many rows. speaker: its code.
    """

    def __init__(
        self,
        task: StageTask,
        draw: FrameDraw,
        begin: Callable[[int], Generation],
        config: TalkerConfig,
        rows: TalkerRows,
        speaker: int,
        *,
        gives_rows: bool,
        gives_codes: bool,
    ) -> None:
        super().__init__(task, draw, num_codes=config.num_codes, gives_rows=gives_rows, gives_codes=gives_codes)
        self._begin, self._config, self._rows, self._speaker = begin, config, rows, speaker
        widths = {PROMPT: 2 * config.thinker_size, REPLY: config.thinker_size, POSITIONS: 3, TOKENS: None}
        self._ports = {name: StreamedRows(name, width) for name, width in widths.items()}
        self._heard: HeardPrompt | None = None
        self._num_before = 0  # rows of the assistant's turn that stand in the prompt
        self._unused: deque[int] = deque()  # reply rows up to which each chunk goes that is not consumed

    def feed(self, port: str, chunk: StreamChunk) -> list[StageEvent]:
        if port not in self._ports:
            raise StageError(f"stage input {port!r} is not streamed")
        rows = self._ports[port].accept(chunk)
        events: list[StageEvent] = []
        if port == REPLY:
            self._unused.append(self._ports[REPLY].num_rows)
            if self._inputs is not None:
                self._inputs.extend(self._rows.text(rows), chunk.is_last)
                self._ports[REPLY].parts.clear()
        else:
            events.append(ChunkConsumed(self.task.request_id, port))
        if self._inputs is None and not self._is_silent and self._has_prompt:
            self._start_speaking()
        if self._generation is not None and self._inputs is not None:
            self._generation.sequence.num_ready_tokens = self._inputs.num_ready_tokens
        return events

    def consumed(self, sequence: Sequence) -> list[StageEvent]:
        """Chunks of the reply all of whose rows have been read."""
        num_read = sequence.num_reached_tokens - sequence.num_prompt_tokens + NUM_TEXT_BEFORE - self._num_before
        events: list[StageEvent] = []
        while self._unused and self._unused[0] <= num_read:
            self._unused.popleft()
            events.append(ChunkConsumed(sequence.request_id, REPLY))
        return events

    @property
    def _has_prompt(self) -> bool:
        return all(self._ports[port].is_whole for port in PORTS - {REPLY})

    def _start_speaking(self) -> None:
        """As soon as enough of the assistant's turn is there."""
        heard, reply = self._hear(), self._ports[REPLY]
        num_rows = self._num_before + reply.num_rows
        if num_rows < NUM_TEXT_BEFORE:
            self._is_silent = reply.is_whole
            return
        states = torch.cat(self._ports[PROMPT].parts)
        embeddings, states = states.chunk(2, dim=1)
        turn = self._rows.text(torch.cat([embeddings[heard.reply_start :], *reply.parts]))
        kept = heard.kept.to(states.device)
        prompt = self._rows.prompt(
            embeddings[kept], states[kept], self._is_media(heard), turn[:NUM_TEXT_BEFORE], self._speaker
        )
        self._generation = self._begin(len(prompt))
        self._inputs = TalkerInputs(prompt, self._rows.around, heard.positions.to(prompt.device))
        self._inputs.extend(turn[NUM_TEXT_BEFORE:], reply.is_whole)
        for port in self._ports.values():
            port.parts.clear()
        self.sequences.append(self._generation.sequence)

    def _hear(self) -> HeardPrompt:
        """Read once, when the prompt is whole."""
        if self._heard is None:
            counts = {name: self._ports[name].num_rows for name in (PROMPT, POSITIONS, TOKENS)}
            if len(set(counts.values())) != 1 or not counts[PROMPT]:
                raise StageError(f"stage inputs: got rows {counts}, expected one of each for every prompt token")
            positions = torch.cat(self._ports[POSITIONS].parts).T.cpu()
            self._heard = hear(self._token_ids(), positions, self._config.turns)
            self._num_before = counts[PROMPT] - self._heard.reply_start
        return self._heard

    def _token_ids(self) -> list[int]:
        ids: list[int] = torch.cat(self._ports[TOKENS].parts).tolist()
        return ids

    def _is_media(self, heard: HeardPrompt) -> Tensor:
        """[K] bool."""
        ids = torch.cat(self._ports[TOKENS].parts).cpu()[heard.kept]
        return torch.isin(ids, torch.tensor(sorted(self._config.media)))
