"""What runs in an AR stage: how a task becomes sequences, what these are fed, and what comes of their tokens. The
engine itself only schedules, runs and samples, and knows no difference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vllm_omni.core.ar.scheduler import Chunk
from vllm_omni.core.ar.sequence import Sequence
from vllm_omni.errors import StageError
from vllm_omni.layers.sampler import SampledToken, SamplingRow
from vllm_omni.layers.token_inputs import TokenInputs
from vllm_omni.messages import StageEvent, StageTask
from vllm_omni.payload import StreamChunk
from vllm_omni.worker.background import Stop


@dataclass(slots=True)
class Generation:
    """A sequence that writes, how it samples, and the one place that says when and why it ends."""

    sequence: Sequence
    row: SamplingRow
    ending_ids: frozenset[int]  # tokens that end it
    max_new_tokens: int
    finish_reason: str | None = None

    @property
    def num_written(self) -> int:
        return len(self.sequence.token_ids) - self.sequence.num_prompt_tokens

    def write(self, token_id: int) -> None:
        """Appends a sampled token, which may be the last."""
        self.sequence.append(token_id)
        if token_id in self.ending_ids:
            self.end("stop")
        elif self.num_written == self.max_new_tokens:
            self.end("length")

    def end(self, reason: str) -> None:
        """Writes no more."""
        self.finish_reason = reason
        self.sequence.is_writing = False


class ARJob(ABC):
    """One task at work."""

    def __init__(self, task: StageTask) -> None:
        self.task = task
        self.sequences: list[Sequence] = []  # those that exist by now; a job may make them when its inputs have come
        self.num_steps = 0

    def feed(self, port: str, chunk: StreamChunk) -> list[StageEvent]:
        """Accepts a chunk of a streamed input; raises what is wrong with it."""
        raise StageError(f"stage input {port!r} is not streamed")

    def inputs_of(self, chunk: Chunk) -> TokenInputs | None:
        """What the tokens of a chunk are besides their ids; may raise what is wrong with this task."""
        return None

    @abstractmethod
    def row_of(self, sequence: Sequence) -> SamplingRow:
        """How a sequence that writes samples."""

    @abstractmethod
    def record(self, sequence: Sequence, token: SampledToken | None) -> list[StageEvent]:
        """Tokens of a sequence have been computed, and perhaps one sampled. A step that gives several is recorded as if
        each had come in a step of its own.
        """

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Whether nothing is left to compute."""

    @abstractmethod
    def is_over(self, sequence: Sequence) -> bool:
        """Whether nothing is left to compute of one sequence."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The payload's; while the sequences hold their blocks."""

    @abstractmethod
    def meta(self) -> dict[str, Any]:
        """The payload's: plain JSON values."""

    def words(self) -> dict[str, Any]:
        """Of the payload's meta, the words so far; none of a job that writes none."""
        return {}

    @abstractmethod
    def metrics(self) -> dict[str, int]:
        """Counts for the caller; `tokens` and `cache_hits` among them."""


@dataclass(frozen=True, slots=True)
class Written:
    """A token that a step has sampled and that is not recorded yet."""

    job: ARJob
    token_id: int
    row: int  # of the step's states


class ARStage(ABC):
    """The running half of one stage: makes the jobs of its tasks."""

    completes_tokens: ClassVar[bool] = False  # whether `complete` has something to do

    def complete(self, written: Many[Written], states: Tensor) -> None:
        """What is computed at once of all tokens that a step has sampled, before each is recorded. states: [R, D], what
        their logits were made of.
        """

    def preparation(self, task: StageTask) -> Callable[[Stop], Any] | None:
        """What is to be done in the background before the task can start, such as decoding media; its result takes the
        place of `task.prepared`. None: nothing.
        """
        return None

    @abstractmethod
    def start(self, task: StageTask, sequence_ids: Iterator[int]) -> ARJob:
        """A job for a task that is prepared, its streamed inputs not looked at yet; raises what is wrong with the
        task.
        """
