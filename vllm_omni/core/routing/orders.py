"""What the scheduler wants done with stages; whoever hosts them carries the orders out as they come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_omni.params import StageParams
from vllm_omni.payload import StreamChunk
from vllm_omni.request import OmniRequest


@dataclass(frozen=True, slots=True)
class Launch:
    """A stage that now counts as running. Its inputs are complete, but that streamed ones hold the first chunk."""

    request: OmniRequest
    stage: str
    params: StageParams
    inputs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Feed:
    """The next chunk of an input of a running stage."""

    request_id: str
    stage: str
    port: str
    chunk: StreamChunk


@dataclass(frozen=True, slots=True)
class Pause:
    """A running stage is too far ahead of a reader."""

    request_id: str
    stage: str


@dataclass(frozen=True, slots=True)
class Resume:
    """Its readers have caught up."""

    request_id: str
    stage: str


Order = Launch | Feed | Pause | Resume
