"""One speech on its way through the talker: its text as it comes, its sequence, its frames, and the rows that each of
these is fed back as.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from vllm_omni.core.ar.scheduler import Chunk
from vllm_omni.core.ar.sequence import Sequence as TokenSequence
from vllm_omni.engine.ar.base import Generation
from vllm_omni.engine.ar.talker.frames import FramesJob
from vllm_omni.engine.ar.talker.inputs import TalkerInputs
from vllm_omni.engine.ar.talker.job import CODES
from vllm_omni.engine.ar.talker.ports import StreamedRows
from vllm_omni.engine.base import ReadPorts
from vllm_omni.errors import StageError
from vllm_omni.layers.sampler import SampledToken
from vllm_omni.layers.token_inputs import TokenInputs
from vllm_omni.messages import ChunkConsumed, StageEvent, StageRows, StageTask
from vllm_omni.models.qwen3_tts.prompt import NUM_ROLE_TOKENS, Layout, Script, content_id, num_tokens_beside
from vllm_omni.payload import StreamChunk
from vllm_omni.worker.ar.frames.frame_writer import FrameDraw

TEXT, REFERENCE = "text", "reference_codes"


@dataclass(frozen=True, slots=True)
class Opening:
    """How a speech begins."""

    generation: Generation
    layout: Layout
    inputs: Callable[[], TalkerInputs]  # computes the rows of the prompt
    text: Callable[[list[int]], Tensor]  # computes rows [n, D] of text tokens
    text_end: int  # the token behind all words


class TalkerJob(FramesJob):
    """Of a script that is open its turn comes over the port TEXT, in tokens. begin: of a script with words enough for
    its prompt. reference: [n, codes of a frame], of a recording that stands in the prompt.
    """

    def __init__(
        self,
        task: StageTask,
        script: Script,
        begin: Callable[[Script], Opening],
        draw: FrameDraw,
        reference: Tensor,
        reads: ReadPorts,
    ) -> None:
        has_rows, has_codes = CODES in reads.streamed, CODES in reads.whole
        super().__init__(task, draw, num_codes=reference.shape[1], gives_rows=has_rows, gives_codes=has_codes)
        self._script, self._begin = script, begin
        self._reference, self._reads = reference.cpu(), reads
        self._has_told_reference = REFERENCE not in reads.streamed
        self._port = StreamedRows(TEXT, None)
        self._turn: list[int] = []  # what has come over the port before it begins
        self._unused: deque[int] = deque()  # tokens of the port up to which each chunk goes that is not consumed
        self._num_before = NUM_ROLE_TOKENS + num_tokens_beside(len(reference)) - len(script.reference)  # in the prompt
        self._trailing: list[int] = []  # text tokens, one for each frame; padding follows once they are whole
        self._is_whole = False
        self._num_embedded = 0  # of them
        self._opening: Opening | None = None
        if not script.is_open:
            self._start(script)

    def feed(self, port: str, chunk: StreamChunk) -> list[StageEvent]:
        if port != TEXT or not self._script.is_open:
            return super().feed(port, chunk)
        tokens = self._port.accept(chunk).tolist()
        self._unused.append(self._port.num_rows)
        if self._opening is not None:
            self._trailing += [*tokens, self._opening.text_end] if chunk.is_last else tokens
            self._text_has_come(chunk.is_last)
            return []
        self._turn += tokens
        if chunk.is_last or len(self._turn) >= max(self._num_before, NUM_ROLE_TOKENS + 1):
            role, words = self._turn[:NUM_ROLE_TOKENS], self._turn[NUM_ROLE_TOKENS:]
            if not words:
                raise StageError(f"stage input {TEXT!r}: got {len(role)} tokens in all, expected words behind the role")
            self._start(dataclasses.replace(self._script, role=role, words=words, is_open=not chunk.is_last))
        return []

    def inputs_of(self, chunk: Chunk) -> TokenInputs | None:
        opening = self._opening
        assert opening is not None, "a speech that has not begun was scheduled"
        if self._inputs is None:
            self._inputs = opening.inputs()
        new = self._trailing[self._num_embedded :]
        if new or (self._is_whole and self._inputs.num_ready_tokens is not None):
            self._inputs.extend(opening.text(new).unbind() if new else (), self._is_whole)
            self._num_embedded += len(new)
        return super().inputs_of(chunk)

    def consumed(self, sequence: TokenSequence) -> list[StageEvent]:
        """Chunks of text all of whose tokens have been read."""
        num_beyond = sequence.num_reached_tokens - sequence.num_prompt_tokens
        events: list[StageEvent] = []
        while self._unused and num_beyond >= 0 and self._unused[0] <= self._num_before + num_beyond:
            self._unused.popleft()
            events.append(ChunkConsumed(sequence.request_id, TEXT))
        return events

    def record(self, sequence: TokenSequence, token: SampledToken | None) -> list[StageEvent]:
        events: list[StageEvent] = []
        if not self._has_told_reference:
            self._has_told_reference = True
            events.append(StageRows(sequence.request_id, REFERENCE, self._reference, is_last=True))
        events += super().record(sequence, token)
        if token is not None and not self.ends_with(token.token_id):
            self._name_content()
        return events

    def tensors(self) -> dict[str, Tensor]:
        own = {REFERENCE: self._reference} if REFERENCE in self._reads.whole else {}
        return {**super().tensors(), **own}

    def _start(self, script: Script) -> None:
        self._opening = opening = self._begin(script)
        self._generation = opening.generation
        self._trailing = list(opening.layout.trailing)
        self.sequences.append(opening.generation.sequence)
        self._text_has_come(not script.is_open)

    def _text_has_come(self, is_whole: bool) -> None:
        self._is_whole = is_whole
        sequence = self._started.sequence
        sequence.num_ready_tokens = None if is_whole else sequence.num_prompt_tokens + len(self._trailing)
        if self._started.num_written:
            self._name_content()

    def _name_content(self) -> None:
        """What the prefix cache knows the last frame by, once the text beside it is there: it is computed then."""
        sequence, place = self._started.sequence, self._started.num_written - 1
        assert sequence.content_ids is not None
        text = self._trailing[place] if place < len(self._trailing) else None
        sequence.content_ids[-1] = content_id(text, self._frames[place])
