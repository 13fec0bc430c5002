"""Jobs whose tokens are the first codes of frames: a step completes the frames of all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from vllm_omni.core.ar.sequence import Sequence as TokenSequence
from vllm_omni.engine.ar.base import Written
from vllm_omni.engine.ar.talker.job import CodesJob
from vllm_omni.errors import StageError
from vllm_omni.layers.batched_draw import DrawSettings
from vllm_omni.layers.sampler import SampledToken
from vllm_omni.messages import StageEvent, StageTask
from vllm_omni.params import SamplingParams, sample_seed
from vllm_omni.worker.ar.frames.frame_writer import FrameDraw, FrameWriter

OTHER_STREAM = 0x51B7A1CE  # from the seed of the first codes to that of all others


class FramesJob(CodesJob):
    """draw: of all codes of a frame but the first. num_codes: of a frame."""

    def __init__(
        self, task: StageTask, draw: FrameDraw, *, num_codes: int, gives_rows: bool, gives_codes: bool
    ) -> None:
        super().__init__(task, gives_rows, gives_codes)
        self.draw = draw
        self._num_codes = num_codes
        self._frames: list[list[int]] = []

    def ends_with(self, code: int) -> bool:
        """Whether nothing is spoken of a first code, and nothing follows it."""
        return code in self._started.ending_ids

    def add_frame(self, codes: list[int], row: Tensor) -> None:
        """All codes of the next frame, and the sum [D] of the embeddings of all but the first."""
        self._frames.append(codes)
        assert self._inputs is not None, "a frame was written before its prompt was computed"
        self._inputs.join(row)

    def record(self, sequence: TokenSequence, token: SampledToken | None) -> list[StageEvent]:
        is_spoken = token is not None and not self.ends_with(token.token_id)
        if is_spoken and min(self._frames[self._started.num_written]) < 0:
            raise StageError("codes: got NaN or infinity, expected finite numbers; try dtype float32")
        return super().record(sequence, token)

    def codes(self, start: int, stop: int) -> Tensor:
        """[n, codes of a frame], on the CPU: they were read there."""
        return torch.tensor(self._frames[start:stop], dtype=torch.int64).view(-1, self._num_codes)


def complete_frames(writer: FrameWriter, written: Sequence[Written], states: Tensor) -> None:
    """Writes the frames that the first codes of a step begin, into their jobs. states: [R, D], as ARStage.complete."""
    speaking = [(cast(FramesJob, each.job), each) for each in written]
    speaking = [(job, each) for job, each in speaking if not job.ends_with(each.token_id)]
    if not speaking:
        return
    picked = states[[each.row for _, each in speaking]] if len(speaking) < len(states) else states
    frames = writer.write(picked, [each.token_id for _, each in speaking], [job.draw for job, _ in speaking])
    for (job, _), codes, row in zip(speaking, frames.codes, frames.rows, strict=True):
        job.add_frame(codes, row)


def frame_draw(settings: DrawSettings, params: SamplingParams) -> FrameDraw:
    """By the seed of the request's parameters, where they have one."""
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sample_seed(params.seed, OTHER_STREAM))
    return FrameDraw(settings, generator)
