"""The two contracts of a stage kind: StageSpec is all that is known before anything is loaded, StageEngine what runs.

A stage kind is a subclass of each and one row in the registry, which names the spec. Admission, the planner and
`vllm-omni check` know specs alone. An engine is single-threaded, never sleeps, and never knows of other stages.
"""

from __future__ import annotations

import enum
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_omni.config.schema import DiTCacheConfig, LimitsConfig, OmniConfig, StageConfig
from vllm_omni.engine.parallel import check_axes
from vllm_omni.errors import ConfigError, StageError
from vllm_omni.messages import StageEvent, StageTask
from vllm_omni.params import StageParams
from vllm_omni.payload import StagePayload, StageSignature, StreamChunk
from vllm_omni.request import OmniRequest
from vllm_omni.utils.device import Copies, CudaCopies, is_cpu, is_cuda, resolve_device
from vllm_omni.utils.files import ModelFolders
from vllm_omni.utils.precision import Precision, choose_precision, choose_quantization
from vllm_omni.voices import VoiceStore

if TYPE_CHECKING:
    from torch import Tensor, device, dtype

    from vllm_omni.worker.background import Background
    from vllm_omni.worker.model_pool import ModelPool


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes that a stage will hold, known from its config and the safetensors headers alone."""

    weights_bytes: int = 0
    kv_pool_bytes: int = 0
    activation_bytes: int = 0
    step_cache_bytes: int = 0
    adapter_bytes: int = 0  # of LoRA adapters
    decoding_bytes: int = 0  # of one picture at a time
    num_ranks: int = 1  # that hold so much each; what only one of them holds is among it, so that nothing is too little
    offloaded_bytes: int = 0  # weights that wait in the host's memory; not among the total
    wanted_bytes: int = 0  # what it could use besides, where memory is left over; not among the total
    remark: str = ""  # what it means, for `vllm-omni check`

    @property
    def total_bytes(self) -> int:
        """Of all ranks."""
        return self.rank_bytes * self.num_ranks

    @property
    def rank_bytes(self) -> int:
        """Of one rank."""
        caches = self.kv_pool_bytes + self.step_cache_bytes + self.adapter_bytes
        return self.weights_bytes + caches + self.activation_bytes + self.decoding_bytes


@dataclass(frozen=True, slots=True)
class ReadPorts:
    """The output ports of a stage that somebody reads; the others cost nothing."""

    whole: frozenset[str] = frozenset()  # when the stage is done
    streamed: frozenset[str] = frozenset()  # row by row, as they are made
    by_stages: bool = False  # whether a stage that runs for the request at hand is among the readers

    def __contains__(self, port: str) -> bool:
        return port in self.whole or port in self.streamed


@dataclass(frozen=True, slots=True)
class EngineContext:
    """What an engine is given besides its spec."""

    device: device
    dtype: dtype
    models: ModelPool  # loaded models, shared by the stages of this process
    background: Background  # threads for work that needs no model, such as decoding media
    reads: ReadPorts = field(default_factory=ReadPorts)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    dit_cache: DiTCacheConfig = field(default_factory=DiTCacheConfig)
    replica: int = 0  # of the stage's those of this process: what they cannot share has its number


class StageSpec(ABC):
    """All that is known of one stage before it is loaded. Made once, when the config is; reads configuration files and
    safetensors headers, never weights. Safe to ask from any thread.
    """

    options_type: ClassVar[type]  # frozen dataclass of the kind's own YAML keys
    params_type: ClassVar[type[StageParams]]  # what requests use for it
    portable_types: ClassVar[tuple[type, ...]] = ()  # what `portable` may return, besides None

    stage: StageConfig
    limits: LimitsConfig
    signature: StageSignature
    defaults: Mapping[str, Any]  # of the fields of `params_type`: the config's, and below them the checkpoint's own
    request_keys: frozenset[str] = frozenset()  # the keys of `OmniRequest.fields` that it reads and answers for
    media_keys: frozenset[str] = frozenset()  # of them those that hold media: files' paths, which no stranger may name
    input_media: frozenset[str] = frozenset()  # kinds of parts of a chat message that it reads besides text
    frame_rate: float | None = None  # frames per second of the videos that it makes, where the request says none
    request_choices: Mapping[str, tuple[str, ...]] = MappingProxyType(
        {}
    )  # the values that one of `request_keys` may have
    voices: VoiceStore | None = None  # those that callers may add, and name as they do the checkpoint's own
    reads_params: bool = True  # whether it looks at its parameters; those that no stage reads are refused
    takes_loras: bool = False  # whether its requests may name LoRA adapters
    can_quantize: bool = False  # whether some of its weights may be held in 8 bits
    can_offload: bool = False  # whether its weights may wait in the host's memory
    imports: Sequence[str] = ()  # of large libraries, what its engine takes from them: "transformers:AutoTokenizer"
    parallel_axes: tuple[str, ...] = ()  # the axes of `parallel` along which ranks may share its model

    @classmethod
    def describe(cls, stage: StageConfig, config: OmniConfig, folders: ModelFolders) -> StageSpec:
        """The spec of one stage; ConfigError, without the stage's name, for what is wrong with it."""
        return cls(stage, config, folders)

    def __init__(self, stage: StageConfig, config: OmniConfig, folders: ModelFolders) -> None:
        """A stage with a model resolves its folder and reads its configuration here: nobody does either again."""
        check_axes(stage.parallel, self.parallel_axes, f"a stage of kind {stage.kind!r}")
        self.stage = stage
        self.limits = config.limits
        self.worker_timeout = config.worker_timeout  # seconds that a step may be silent
        self.defaults = stage.defaults

    @cached_property
    def precision(self) -> Precision:
        """What its weights are loaded in and it computes in, and why: all who plan and load read it here."""
        return replace(self.choose_dtype(), quantization=self.choose_quantization())

    def choose_quantization(self) -> str | None:
        """Of the weights, for `precision`; ConfigError for one that the stage cannot have."""
        return choose_quantization(
            self.stage.quantization,
            resolve_device(self.stage.device),
            self.choose_dtype().dtype,
            self.published_quantization(),
            can_quantize=self.can_quantize,
            keeps_halves=self.keeps_halves,
        )

    @property
    def offloads(self) -> bool:
        """Whether the weights of its blocks wait in the host's memory until each is computed."""
        return self.stage.offload == "weights"

    @property
    def sharing_key(self) -> str:
        """What else stages must have in common to share weights while they run. Those that come and go are one
        thread's: another would find them gone.
        """
        return threading.current_thread().name if self.offloads else ""

    def make_copies(self) -> Callable[[device], Copies] | None:
        """What brings its weights to its device, where they wait elsewhere."""
        return CudaCopies if self.offloads else None

    def check_offload(self) -> None:
        """ConfigError where the weights cannot wait elsewhere."""
        where = resolve_device(self.stage.device)
        if not self.offloads or (self.can_offload and is_cuda(where)):
            return
        if not self.can_offload:
            raise ConfigError("offload: got 'weights', expected none: this stage keeps its weights; remove the key")
        why = "the weights are in the host's memory as it is" if is_cpu(where) else "only to cuda do they come in time"
        raise ConfigError(f"offload: got 'weights' on {where.type}, expected none: {why}; remove the key")

    def choose_dtype(self) -> Precision:
        """The dtype, for `precision`."""
        return choose_precision(self.stage.dtype, resolve_device(self.stage.device), self.published_dtype)

    def published_quantization(self) -> str | None:
        """ "int8" or "float8", where configuration files say that its weights were published so."""
        return None

    def keeps_halves(self) -> bool:
        """Whether all weights that can be quantised were published in bfloat16, by the safetensors headers, and are
        multiplied so beside float32 without being slower.
        """
        return False

    def published_dtype(self) -> dtype | None:
        """What most of the weights that it reads were published in, from configuration files and safetensors headers;
        None where it reads none, and where nothing says so.
        """
        return None

    @abstractmethod
    def load(self, context: EngineContext) -> StageEngine:
        """The engine, its weights loaded."""

    def warm_up(self) -> None:
        """Loads what `check` reads, such as a tokenizer, which comes with the first request otherwise. For stages whose
        engines are elsewhere, while these load.
        """
        return

    def check(self, request: OmniRequest, params: StageParams, reads: ReadPorts) -> Any:
        """What the request means to this stage (tokens, media plans), kept for its task; InvalidRequestError (or
        ResourceError) for a request that the stage could not run. params: with their defaults.
        """
        return None

    def portable(self, prepared: Any) -> Any:
        """What of `check`'s result an engine in another process is given; None: it checks again there."""
        return None

    def draws(self, params: StageParams) -> bool:
        """Whether the stage draws random numbers, from the `seed` that these parameters have then."""
        return False

    def plan_memory(self) -> MemoryPlan:
        """What the stage will hold, with all that it has been granted."""
        return MemoryPlan()

    def grant_memory(self, num_bytes: int) -> None:
        """Some of the `wanted_bytes` of its plan; before it is loaded."""
        raise StageError(f"stage {self.stage.name!r}: got {num_bytes} bytes that it has not asked for")

    def weights_key(self) -> tuple[str, ...]:
        """What two stages must have in common to share their weights."""
        return (self.stage.kind, f"of {self.stage.name} alone")

    def needed_inputs(self, request: OmniRequest, params: StageParams) -> frozenset[str]:
        """The connected input ports that a request reads; others are not computed for it."""
        return frozenset(self.stage.inputs)

    def cache_key(self, task: StageTask) -> str | None:
        """A key under which the payload of this task may serve later requests, or None where it must be computed."""
        return None

    def open_text(self, request: OmniRequest, prepared: Any) -> Callable[[str, bool], Tensor]:
        """Of a request that is open (`OmniRequest.is_open`), where the signature has `text_inputs`: what makes rows of
        the pieces of its text as they come, by a piece and whether it is the last. It raises InvalidRequestError for
        what cannot be read. prepared: of `check`.
        """
        raise StageError(f"stage {self.stage.name!r} reads no text in pieces")

    def job_size(self, request: OmniRequest, params: StageParams, prepared: Any) -> float:
        """Rough seconds-like size of the task for shortest-job-first; only the order matters. prepared: of `check`."""
        return 1.0

    def prefixes(self, params: StageParams, prepared: Any) -> tuple[int, ...]:
        """Hashes of ever longer beginnings of a task's prompt: a replica that was given the same may still hold what it
        computed for them. prepared: of `check`.
        """
        return ()

    def fingerprint(self) -> Mapping[str, Any] | None:
        """What a saved task of this stage must find the same to go on to the same result: plain values by name. None
        where its tasks cannot be saved.
        """
        return None

    def close(self) -> None:
        """Ends what the spec has started beside itself, as the pipeline is shut down; it could be started again."""

    def note(self) -> str:
        """What `vllm-omni check` should say of the stage besides ports and memory; empty for nothing."""
        return ""


class Activity(enum.Enum):
    """What a stage could do now."""

    BUSY = "busy"  # a step would do something
    STEPPING = "stepping"  # a step is under way, in a thread of its own; what executors say
    PENDING = "pending"  # something that runs elsewhere (a file being decoded) will wake it
    IDLE = "idle"  # nothing, until it is given a task, a chunk or the end of a pause


class StageEngine(ABC):
    """Runs one stage. A failure of one task is a `StageFailed` event for it alone; only a broken engine raises from
    `step`.
    """

    @abstractmethod
    def submit(self, task: StageTask) -> None:
        """Takes a task in and returns at once: reading media, encoding and the like are work of later steps. Whatever
        is wrong with it comes back as a StageFailed event.
        """

    def feed(self, request_id: str, port: str, chunk: StreamChunk) -> None:
        """The next chunk of a streamed input of a task that runs; what is wrong with it comes back as StageFailed."""
        raise StageError(f"stage input {port!r} is not streamed")

    def pause(self, request_id: str) -> None:
        """Makes no more rows and words for this task until `resume`: its readers are behind. It keeps what it holds. To
        be overridden by whatever gives them as they are made.
        """

    def resume(self, request_id: str) -> None:
        """Ends a pause."""

    @abstractmethod
    def step(self) -> list[StageEvent]:
        """One batch iteration over all submitted tasks."""

    @abstractmethod
    def abort(self, request_id: str) -> None:
        """Drops a task and frees all it held; unknown ids are fine. No event follows."""

    def partial_result(self, request_id: str) -> StagePayload | None:
        """What a task has made so far of what a caller gets, as its payload would hold it: texts without a finish
        reason, finished pictures, the beginning of audio. None where that is nothing. Changes nothing.
        """
        return None

    def save_state(self, request_id: str) -> Mapping[str, Any] | None:
        """What of a task on its way is needed to go on with it in another process (`StageTask.saved`): plain values and
        tensors, which nobody writes into. None where that is nothing yet, or where the stage cannot. Changes nothing.
        """
        return None

    @abstractmethod
    def activity(self) -> Activity:
        """Whether `step` has something to do; tasks that wait for a chunk or are paused are nothing to do."""

    def breakdown(self) -> Exception | None:
        """Why it cannot go on, where that shows also between steps, as when a process that it needs has died."""
        return None

    def close(self) -> None:
        """Ends what it has started beside itself; no call follows."""

    def get_stats(self) -> Mapping[str, Any]:
        """Counters and gauges for monitoring; `kernels`: what it computes with, names and words."""
        return {}

    def check_integrity(self) -> None:
        """Raises when an internal invariant is broken; cheap, for tests and idle moments."""


def model_folder(stage: StageConfig, folders: ModelFolders, expected: str) -> Path:
    """The stage's `model`, resolved; ConfigError where it names none. expected: what the folder should hold."""
    if stage.model is None:
        raise ConfigError(f"model: missing; expected {expected}")
    return folders.resolve(stage.model, stage.revision, stage.variant)
