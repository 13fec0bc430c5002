"""One speech on its way through the talker: its sequence, its frames, and the rows that each frame is fed back as."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vllm_omni.core.ar.scheduler import Chunk
from vllm_omni.core.ar.sequence import Sequence as TokenSequence
from vllm_omni.engine.ar.base import Generation
from vllm_omni.engine.ar.talker.inputs import TalkerInputs
from vllm_omni.engine.ar.talker.job import CodesJob
from vllm_omni.errors import StageError
from vllm_omni.layers.sampler import SampledToken
from vllm_omni.layers.token_inputs import TokenInputs
from vllm_omni.messages import StageEvent, StageTask
from vllm_omni.models.qwen3_tts.frame_writer import FrameDraw
from vllm_omni.models.qwen3_tts.prompt import content_id


class TalkerJob(CodesJob):
    """make_inputs: computes the rows of prompt and text, in the step that first needs them. trailing: the text tokens
    that join the frames. draw: of all codes of a frame but the first. num_codes: of a frame.
    """

    def __init__(
        self,
        task: StageTask,
        generation: Generation,
        make_inputs: Callable[[], TalkerInputs],
        trailing: Sequence[int],
        draw: FrameDraw,
        *,
        num_codes: int,
        gives_rows: bool,
        gives_codes: bool,
    ) -> None:
        super().__init__(task, gives_rows, gives_codes)
        self.draw = draw
        self._generation = generation
        self._make_inputs = make_inputs
        self._trailing = trailing
        self._num_codes = num_codes
        self._frames: list[list[int]] = []
        self.sequences.append(generation.sequence)

    def ends_with(self, code: int) -> bool:
        """Whether nothing is spoken of a first code, and nothing follows it."""
        return code in self._started.ending_ids

    def add_frame(self, codes: list[int], row: Tensor) -> None:
        """All codes of the next frame, and the sum [D] of the embeddings of all but the first."""
        self._frames.append(codes)
        assert self._inputs is not None, "a frame was written before its prompt was computed"
        self._inputs.join(row)

    def inputs_of(self, chunk: Chunk) -> TokenInputs | None:
        if self._inputs is None:
            self._inputs = self._make_inputs()
        return super().inputs_of(chunk)

    def record(self, sequence: TokenSequence, token: SampledToken | None) -> list[StageEvent]:
        if token is None or self.ends_with(token.token_id):
            return super().record(sequence, token)
        place = self._started.num_written
        frame = self._frames[place]
        if min(frame) < 0:
            raise StageError("codes: got NaN or infinity, expected finite numbers; try dtype float32")
        events = super().record(sequence, token)
        assert sequence.content_ids is not None
        text = self._trailing[place] if place < len(self._trailing) else None
        sequence.content_ids[-1] = content_id(text, frame)
        return events

    def codes(self, start: int, stop: int) -> Tensor:
        """[n, codes of a frame], on the CPU: they were read there."""
        return torch.tensor(self._frames[start:stop], dtype=torch.int64).view(-1, self._num_codes)
