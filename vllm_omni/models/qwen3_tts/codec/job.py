"""One request in the codec stage: the frames that wait, and the audio that is kept. Runs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from vllm_omni.models.qwen3_tts.codec.frame_queue import FrameQueue


@dataclass(slots=True)
class CodecJob:
    """A stream of frames, each decoded once."""

    request_id: str
    frames: FrameQueue
    reference: FrameQueue | None = None  # frames that come before them and are not heard; None: there is no such port
    reference_key: bytes = b""  # of all its frames, as of WarmStates
    slot: int | None = None  # of its state; None before it is given one
    is_paused: bool = False
    num_decoded: int = 0  # frames, the reference's included
    num_heard: int = 0
    num_steps: int = 0
    audio: list[Tensor] = field(default_factory=list)  # [samples], where it is read whole

    @property
    def queue(self) -> FrameQueue:
        """Where its next frames come from."""
        return self.frames if self.reference is None or self.reference.is_done else self.reference

    @property
    def is_ready(self) -> bool:
        """Whether a step would do something for it, given a slot. A reference is begun when all of it is there."""
        queue = self.queue
        is_there = queue is self.frames or queue.is_complete
        return is_there and bool(queue.chunks) and not self.is_paused

    @property
    def is_done(self) -> bool:
        return self.queue is self.frames and self.frames.is_done

    def consume(self, num_frames: int) -> int:
        """Lets go of frames that were decoded -> how many chunks are used up."""
        queue = self.queue
        self.num_decoded += num_frames
        self.num_heard += num_frames if queue is self.frames else 0
        return queue.consume(num_frames)

    def counts(self) -> Mapping[str, int]:
        """What a caller is told of the work."""
        return {"steps": self.num_steps, "frames": self.num_heard}
