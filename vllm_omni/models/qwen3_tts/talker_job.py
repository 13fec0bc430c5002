"""One speech on its way through the talker: its sequence, its frames, and the rows that each frame is fed back as."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm_omni.core.ar.scheduler import Chunk
from vllm_omni.core.ar.sequence import Sequence as TokenSequence
from vllm_omni.engine.ar.base import Generation
from vllm_omni.engine.ar.talker.frames import FramesJob
from vllm_omni.engine.ar.talker.inputs import TalkerInputs
from vllm_omni.layers.sampler import SampledToken
from vllm_omni.layers.token_inputs import TokenInputs
from vllm_omni.messages import StageEvent, StageTask
from vllm_omni.models.qwen3_tts.prompt import content_id
from vllm_omni.worker.ar.frames.frame_writer import FrameDraw


class TalkerJob(FramesJob):
    """make_inputs: computes the rows of prompt and text, in the step that first needs them. trailing: the text tokens
    that join the frames.
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
        super().__init__(task, draw, num_codes=num_codes, gives_rows=gives_rows, gives_codes=gives_codes)
        self._generation = generation
        self._make_inputs = make_inputs
        self._trailing = trailing
        self.sequences.append(generation.sequence)

    def inputs_of(self, chunk: Chunk) -> TokenInputs | None:
        if self._inputs is None:
            self._inputs = self._make_inputs()
        return super().inputs_of(chunk)

    def record(self, sequence: TokenSequence, token: SampledToken | None) -> list[StageEvent]:
        if token is None or self.ends_with(token.token_id):
            return super().record(sequence, token)
        place = self._started.num_written
        frame = self._frames[place]
        events = super().record(sequence, token)
        assert sequence.content_ids is not None
        text = self._trailing[place] if place < len(self._trailing) else None
        sequence.content_ids[-1] = content_id(text, frame)
        return events
