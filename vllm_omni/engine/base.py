"""The contract of a stage engine, the task it is given and the events it returns.

A stage kind is one subclass of StageEngine and one row in the registry. An engine is single-threaded, never sleeps,
and never knows of other stages. A failure of one task is a `StageFailed` event for it alone; only a broken engine
raises from `step`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.errors import OmniError, StageError
from vllm_omni.params import StageParams
from vllm_omni.payload import StagePayload, StageSignature, StreamChunk
from vllm_omni.request import OmniRequest
from vllm_omni.utils.files import resolve_model_folder

if TYPE_CHECKING:
    from torch import Tensor, device, dtype

    from vllm_omni.models.pool import ModelPool


@dataclass(frozen=True, slots=True)
class StageTask:
    """One request's work in one stage: the parameters have their defaults; inputs are complete, but for the ports that
    its signature lists as streamed: those hold their first StreamChunk, and `StageEngine.feed` brings the others.
    """

    request: OmniRequest
    stage: str
    params: StageParams
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def request_id(self) -> str:
        return self.request.request_id


@dataclass(frozen=True, slots=True)
class StageProgress:
    """`step` of `num_steps` is done. `text` is what an AR stage has newly written."""

    request_id: str
    step: int
    num_steps: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class StageRows:
    """New rows [n, ...] of a streamed output port, in order. is_last: the port is complete, though the stage may go on;
    what StageDone finds open is complete then. meta: as in the payload, where a reader needs it (a sample rate).
    """

    request_id: str
    port: str
    rows: Tensor
    is_last: bool = False
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StageTook:
    """The task has used up one more chunk of a streamed input; its writer may go on."""

    request_id: str
    port: str


@dataclass(frozen=True, slots=True)
class StageDone:
    """The task is finished. `metrics` are counts for the caller: steps, tokens, cache_hits, ..."""

    payload: StagePayload
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def request_id(self) -> str:
        return self.payload.request_id


@dataclass(frozen=True, slots=True)
class StageFailed:
    """The task ended without a result; the others go on."""

    request_id: str
    error: OmniError


StageEvent = StageProgress | StageRows | StageTook | StageDone | StageFailed


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes that a stage will hold, known from its config and the safetensors headers alone."""

    weights_bytes: int = 0
    kv_pool_bytes: int = 0
    activation_bytes: int = 0
    step_cache_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_pool_bytes + self.activation_bytes + self.step_cache_bytes


@dataclass(frozen=True, slots=True)
class EngineContext:
    """What an engine is given besides its own config. `wanted`: the output ports that somebody reads whole;
    `streamed`: those that somebody reads row by row. Others cost nothing.
    """

    config: OmniConfig
    device: device
    dtype: dtype
    models: ModelPool
    wanted: frozenset[str]
    streamed: frozenset[str] = frozenset()


class StageEngine(ABC):
    """Hosts one stage. Constructing it loads the weights.

    options_type: frozen dataclass of the kind's own YAML keys. params_type: the params class that requests use for it.
    """

    options_type: ClassVar[type]
    params_type: ClassVar[type[StageParams]]

    @classmethod
    @abstractmethod
    def signature(cls, stage: StageConfig) -> StageSignature:
        """The stage's ports; reads configuration files, never weights."""

    @classmethod
    @abstractmethod
    def plan_memory(cls, stage: StageConfig, config: OmniConfig) -> MemoryPlan:
        """What the stage will hold; reads configuration files and safetensors headers, never weights."""

    @classmethod
    def weights_key(cls, stage: StageConfig) -> tuple[str, ...]:
        """What two stages must have in common to share their weights."""
        folder = "" if stage.model is None else str(resolve_model_folder(stage.model).resolve())
        return (stage.kind, folder or f"of {stage.name} alone")

    @classmethod
    def needed_inputs(cls, stage: StageConfig, request: OmniRequest, params: StageParams) -> frozenset[str]:
        """The input ports that a request (its parameters have their defaults) reads; others are not computed
        for it.
        """
        return frozenset(stage.inputs)

    @classmethod
    def request_keys(cls, stage: StageConfig) -> frozenset[str]:
        """The keys of `OmniRequest.fields` that the stage reads; `check` answers for their values."""
        return frozenset()

    @classmethod
    def reads_params(cls, stage: StageConfig) -> bool:
        """Whether the stage looks at its parameters; a request that sets some which no stage reads is refused."""
        return True

    @classmethod
    def cache_key(cls, stage: StageConfig, task: StageTask) -> str | None:
        """A key under which the payload of this task may serve later requests, or None where it must be computed."""
        return None

    @classmethod
    def note(cls, stage: StageConfig) -> str:
        """What `vllm-omni check` should say of the stage besides ports and memory; empty for nothing."""
        return ""

    @abstractmethod
    def __init__(self, stage: StageConfig, context: EngineContext) -> None: ...

    @abstractmethod
    def check(self, request: OmniRequest, params: StageParams) -> None:
        """Raises InvalidRequestError (or ResourceError) for a request that this stage could not run; called
        before any work.
        """

    @abstractmethod
    def submit(self, task: StageTask) -> None:
        """Takes a task in; whatever is wrong with it comes back as a StageFailed event."""

    def feed(self, request_id: str, port: str, chunk: StreamChunk) -> None:
        """The next chunk of a streamed input of a task that runs; what is wrong with it comes back as StageFailed."""
        raise StageError(f"stage input {port!r} is not streamed")

    def pause(self, request_id: str) -> None:
        """Makes no more rows for this task until `resume`: its readers are behind. It keeps what it holds."""
        raise StageError(f"request {request_id!r}: the stage streams nothing, so it cannot pause")

    def resume(self, request_id: str) -> None:
        """Ends a pause."""
        raise StageError(f"request {request_id!r}: the stage streams nothing, so it cannot resume")

    @abstractmethod
    def step(self) -> list[StageEvent]:
        """One batch iteration over all submitted tasks."""

    @abstractmethod
    def abort(self, request_id: str) -> None:
        """Forgets a task and frees all it held; unknown ids are fine. No event follows."""

    @abstractmethod
    def has_work(self) -> bool:
        """Whether `step` has something to do; tasks that wait for a chunk or are paused are nothing to do."""

    def job_size(self, request: OmniRequest, params: StageParams) -> float:
        """Rough seconds-like size of the task for shortest-job-first; only the order matters."""
        return 1.0

    def get_stats(self) -> dict[str, Any]:
        """Counters and gauges for monitoring."""
        return {}

    def check_integrity(self) -> None:
        """Raises when an internal invariant is broken; cheap, for tests and idle moments."""
