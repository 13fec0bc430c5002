"""What scheduler, hosts and engines tell each other: orders to a stage, and the events that it reports.

Orders: StageTask, Feed, Pause, Resume, Skip. Events: StageProgress, StageRows, ChunkConsumed, StageDone, StageFailed.
All of them are frozen; within a process tensors pass by reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_omni.errors import OmniError
from vllm_omni.params import StageParams
from vllm_omni.payload import RowRange, StagePayload
from vllm_omni.request import OmniRequest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class StageTask:
    """One request's work in one stage, which counts as running from now on."""

    request: OmniRequest
    stage: str
    params: StageParams  # with their defaults
    inputs: Mapping[str, Any] = field(default_factory=dict)  # complete, but of a streamed port its first chunk alone:
    # from the scheduler a RowRange, to the engine the StreamChunk that its host has cut
    prepared: Any = None  # what the stage's `StageSpec.check` made of the request
    saved: Mapping[str, Any] | None = None  # what `StageEngine.save_state` gave of this task: it goes on from there
    size: float = 1.0  # as of `StageSpec.job_size`
    prefixes: tuple[int, ...] = ()  # hashes of ever longer beginnings of its prompt, where a replica may hold them
    is_watched: bool = True  # whether a caller sees its words and rows as they come

    @property
    def request_id(self) -> str:
        return self.request.request_id


@dataclass(frozen=True, slots=True)
class Feed:
    """A running stage gets the next chunk of a streamed input; whoever hosts the stage holds the rows and cuts them."""

    request_id: str
    stage: str
    port: str
    rows: RowRange


@dataclass(frozen=True, slots=True)
class Pause:
    """A running stage is too far ahead of a reader: it makes no more rows until Resume, and keeps what it holds."""

    request_id: str
    stage: str


@dataclass(frozen=True, slots=True)
class Resume:
    """The readers of a paused stage have caught up."""

    request_id: str
    stage: str


@dataclass(frozen=True, slots=True)
class Skip:
    """A stage will not run for this request: rows that were streamed to it are not needed."""

    request_id: str
    stage: str


Order = StageTask | Feed | Pause | Resume | Skip


@dataclass(frozen=True, slots=True)
class StageProgress:
    """`step` of `num_steps` is done. What is new may be that of several steps, where nobody watches the task."""

    request_id: str
    step: int
    num_steps: int
    text: str = ""  # what an AR stage has newly written, of one sample
    previews: Tensor | None = None  # [N, H, W, 3] uint8: all samples of a diffusion stage, where they are to be shown
    token_ids: tuple[int, ...] = ()  # newly written by that sample; some of their text may still be held back
    logprobs: tuple[Mapping[int, float], ...] | None = None  # of these tokens, as Completion's; None: not asked for
    finish_reason: str | None = None  # where that sample has just ended
    sample: int = 0  # which one it is
    num_samples: int = 1  # of the request


@dataclass(frozen=True, slots=True)
class StageWorked:
    """Something was computed for a task, among others, and there is nothing to tell of it yet (part of a prompt, of
    conditions, words that nobody waits for): the stage is not stuck.
    """

    request_id: str


@dataclass(frozen=True, slots=True)
class StageRows:
    """New rows of a streamed output port, in order. What StageDone finds open is complete then."""

    request_id: str
    port: str
    rows: Tensor  # [n, ...]
    is_last: bool = False  # the port is complete, though the stage may go on
    meta: Mapping[str, Any] = field(default_factory=dict)  # as in the payload, where a reader needs it (a sample rate)


@dataclass(frozen=True, slots=True)
class ChunkConsumed:
    """The task has used up one more chunk of a streamed input; its writer may go on."""

    request_id: str
    port: str


@dataclass(frozen=True, slots=True)
class StageDone:
    """The task is finished."""

    payload: StagePayload
    metrics: Mapping[str, Any] = field(default_factory=dict)  # counts for the caller: steps, tokens, cache_hits, ...

    @property
    def request_id(self) -> str:
        return self.payload.request_id


@dataclass(frozen=True, slots=True)
class StageFailed:
    """The task ended without a whole result; the others go on."""

    request_id: str
    error: OmniError
    made: StagePayload | None = None  # what there was of a result, as of `StageEngine.partial_result`
    is_lost: bool = False  # the engine broke, perhaps over another task: it may be run again
    is_blameless: bool = False  # lost over a task of another stage


StageEvent = StageProgress | StageWorked | StageRows | ChunkConsumed | StageDone | StageFailed
