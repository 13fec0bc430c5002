"""The configuration as frozen dataclasses: a YAML key equals its field. Knows no file format and no stage kind."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_omni import registry
from vllm_omni.config.condition import Condition
from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import brief, check_number, did_you_mean

MAX_GB = 1e6
MAX_MB = 1e9
MAX_THREADS = 4096
MAX_VOICES = 10_000
MAX_RANK = 4096  # of an adapter
MAX_RANKS = 64  # that share one model
MAX_REPLICAS = 1024
MAX_RAY = 10_000  # of a resource
PROCESS = "process"  # the executor whose processes are all of this machine, and may be shared
INPUT = "{input}"


class SchedulerType(str, enum.Enum):
    """Which waiting request starts next."""

    FIFO = "fifo"
    PRIORITY = "priority"
    SHORTEST_JOB_FIRST = "shortest_job_first"


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The queue of requests and its order."""

    policy: SchedulerType | str = SchedulerType.FIFO  # or the name of a policy that was added to the registry
    max_queue_size: int = 256  # requests that wait; one more is rejected
    max_running: int = 64  # requests that run at the same time
    # the names that a request may ask for -> how much its waiting time counts (policy PRIORITY)
    priority_weights: Mapping[str, float] = field(default_factory=lambda: {"high": 4.0, "normal": 1.0, "low": 0.25})


@dataclass(frozen=True, slots=True)
class DiTCacheConfig:
    """Memory of the DiTCacheManager."""

    max_memory_mb: float = 1024.0  # for step caches of running requests
    prompt_embeds_mb: float = 64.0  # for prompt embeddings, which outlive a request; 0 keeps none
    encoded_images_mb: float = 64.0  # of each stage, for what it made of pictures; they outlive a request; 0 keeps none


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """The largest values that a request may ask for or bring along; checked before any work."""

    max_prompt_chars: int = 100_000
    max_pixels: int = 4_194_304  # of an image that is made, and of each frame of a video
    max_frames: int = 1_000  # of a video that is made
    max_total_pixels: int = 402_653_184  # of all frames of all videos that one request makes in one stage
    max_inference_steps: int = 1_000
    max_guidance_scale: float = 100.0
    max_outputs: int = 16  # samples of one request in one stage
    max_duration_s: float = 600.0  # of audio that is made
    max_audio_s: float = 600.0  # of audio that a request brings
    max_audio_mb: float = 200.0  # of its file, or of its decoded samples
    max_image_pixels: int = 50_000_000  # of an image that a request brings, and of each frame of a video
    max_images: int = 64  # in all messages of a prompt
    max_video_s: float = 600.0
    max_video_frames: int = 40_000  # of the file or array, before frames are picked
    max_video_mb: float = 500.0


@dataclass(frozen=True, slots=True)
class LoRAConfig:
    """`lora:` of a stage: the adapters that its requests may use."""

    folders: tuple[str, ...]  # whose .safetensors files they are, those directly in them; nothing else is ever read
    max_memory_mb: float = 512.0  # for loaded adapters; those that no running request uses go when others are needed
    max_rank: int = 256

    def __post_init__(self) -> None:
        if not self.folders:
            raise ConfigError("folders: got none, expected a list of folders that hold adapters")
        check_number("max_memory_mb", self.max_memory_mb, 0, MAX_MB, above_low=True, raises=ConfigError)
        check_number("max_rank", self.max_rank, 1, MAX_RANK, integer=True, raises=ConfigError)


@dataclass(frozen=True, slots=True)
class VoicesConfig:
    """`voices:` of a stage that clones voices: where those are kept that callers may name."""

    folder: str  # made when the first voice is added; nothing but its .safetensors files is ever read
    max_voices: int = 100
    max_mb: float = 512.0  # of all files

    def __post_init__(self) -> None:
        check_number("max_voices", self.max_voices, 1, MAX_VOICES, integer=True, raises=ConfigError)
        check_number("max_mb", self.max_mb, 0, MAX_MB, above_low=True, raises=ConfigError)


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """`parallel:` of a stage: how many ranks (processes with a device each) share its model, and along what."""

    tensor: int = 1  # each rank has a share of the heads and widths of every layer
    sequence: int = 1  # each has a share of every sample's tokens, and of the heads while they attend
    guidance: int = 1  # each has some of a step's rows: the conditional and the unconditional branch

    def __post_init__(self) -> None:
        for axis in ("tensor", "sequence", "guidance"):
            check_number(axis, getattr(self, axis), 1, MAX_RANKS, integer=True, raises=ConfigError)
        check_number("guidance", self.guidance, 1, 2, integer=True, raises=ConfigError)
        check_number("the product of all", self.size, 1, MAX_RANKS, integer=True, raises=ConfigError)

    @property
    def size(self) -> int:
        """All ranks."""
        return self.tensor * self.sequence * self.guidance


@dataclass(frozen=True, slots=True)
class PromptsConfig:
    """How a model is asked for what a route of the server promises; `{input}` stands for the caller's own words."""

    speech: str | None = None  # asks a model that replies to read out instead; None: it speaks what it is given

    def __post_init__(self) -> None:
        if self.speech is not None and INPUT not in self.speech:
            expected = f"a text with {INPUT}, as in 'read out: {INPUT}'"
            raise ConfigError(f"speech: got {brief(self.speech)}, expected {expected}")

    def for_speech(self, text: str) -> str:
        """What the model is given so that it says `text`."""
        return text if self.speech is None else self.speech.replace(INPUT, text)


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """How an edge hands its rows on while they are being made. Counts are rows (tokens, codes) of the port."""

    first_chunk: int = 1  # new rows of the first chunk
    chunk: int = 1  # new rows of every later chunk
    left_context: int = 0  # rows before the new ones that a chunk brings along again
    look_ahead: int = 0  # rows behind the new ones that must be there, and come along, unless the stream ends
    max_ahead: int = 4096  # how far the writer may be ahead of what the reader has used up, before it pauses
    chunk_timeout_s: float = 60.0  # the longest that a reader with nothing left to do may wait for its next chunk
    max_chunk: int | None = None  # each later chunk is twice the one before, up to so many; None: all are `chunk`

    @property
    def largest_chunk(self) -> int:
        """New rows of the largest chunk."""
        return max(self.first_chunk, self.chunk, self.max_chunk or 0)

    def __post_init__(self) -> None:
        for name, low in {"first_chunk": 1, "chunk": 1, "left_context": 0, "look_ahead": 0, "max_ahead": 1}.items():
            check_number(name, getattr(self, name), low, integer=True, raises=ConfigError)
        if self.max_chunk is not None:
            check_number("max_chunk", self.max_chunk, self.chunk, integer=True, raises=ConfigError)
        check_number("chunk_timeout_s", self.chunk_timeout_s, 0, above_low=True, raises=ConfigError)
        least = self.largest_chunk + self.look_ahead
        if self.max_ahead < least:
            raise ConfigError(
                f"max_ahead: got {self.max_ahead}, expected at least {least}, the rows of a chunk and its look_ahead; "
                "with fewer the writer would pause before a chunk is there"
            )


@dataclass(frozen=True, slots=True)
class EdgeConfig:
    """Where an input comes from, when, and how."""

    source: str = field(metadata={"key": "from"})  # "stage.port"; `from` in a YAML
    when: str | None = None  # a Condition on the meta of the source's payload; None for always
    stream: StreamConfig | None = None  # None: the port whole, when its stage is done

    def __post_init__(self) -> None:
        try:
            self.condition()
        except ConfigError as error:
            raise ConfigError(f"when: {error}") from error
        if self.when is not None and self.stream is not None:
            raise ConfigError(
                f"stream: cannot stand beside 'when' ({brief(self.when)}), which is decided when the source is done; "
                "remove one of the two"
            )

    @property
    def stage(self) -> str:
        """The stage that `source` names."""
        return self.source.partition(".")[0]

    def condition(self) -> Condition | None:
        """`when`, read."""
        return None if self.when is None else Condition.parse(self.when)


EdgeLike = str | EdgeConfig


@dataclass(frozen=True, slots=True)
class RayStageConfig:
    """What a stage asks of Ray, where its executor is that."""

    num_cpus: float = 1.0  # also how many threads torch computes with on a CPU, where resources.threads says nothing
    num_gpus: float | None = None  # None: one for each rank where the stage's device is a GPU, else 0
    resources: Mapping[str, float] = field(default_factory=dict)  # of the names that the nodes were started with

    def __post_init__(self) -> None:
        check_number("num_cpus", self.num_cpus, 0, MAX_RAY, raises=ConfigError)
        if self.num_gpus is not None:
            check_number("num_gpus", self.num_gpus, 0, MAX_RAY, raises=ConfigError)
        for name, amount in self.resources.items():
            check_number(f"resources.{name}", amount, 0, MAX_RAY, above_low=True, raises=ConfigError)


@dataclass(frozen=True, slots=True)
class RayConfig:
    """Which Ray the stages run on whose executor is that."""

    address: str | None = None  # host:port; 'local': one is started; None: the one that runs here, else as 'local'
    namespace: str | None = None  # of Ray; None: one of its own


@dataclass(frozen=True, slots=True)
class StageConfig:
    """One stage."""

    name: str
    kind: str  # "ar", "dit", ...: a row of the registry
    model: str | None = None  # a folder, a hub id, or asset://name
    inputs: Mapping[str, EdgeLike] = field(default_factory=dict)  # input port -> "stage.port", or an EdgeConfig
    defaults: Mapping[str, Any] = field(default_factory=dict)  # fields of the kind's params class
    executor: str = "auto"  # "auto" (a thread each where stages are on several devices), or a row of the registry
    process: str | None = None  # by which name stages with executor "process" share one; None: it has one of its own
    replicas: int = 1  # engines that share the stage's tasks
    device: str = "auto"  # or a device of torch: "cpu", "cuda:0"
    devices: tuple[str, ...] = ()  # of the replicas, in turn, in place of `device`
    dtype: str = "auto"  # or "float32", "bfloat16", "float16"
    quantization: str = "auto"  # of weights: "int8", "fp8", "bfloat16", "none", or "auto"
    offload: str = "none"  # "weights": those of the blocks wait in the host's memory until each is computed
    revision: str | None = None  # of a hub id: a branch, a tag or a commit; None: its main branch
    variant: str | None = None  # which weight files: "fp16", "bf16"; None: plain ones, where there are none a variant
    parallel: ParallelConfig = field(default_factory=ParallelConfig)  # the ranks that share its model
    ray: RayStageConfig = field(default_factory=RayStageConfig)
    options: Any = None  # the options dataclass of the kind, of the stage's other YAML keys

    def __post_init__(self) -> None:
        check_number("replicas", self.replicas, 1, MAX_REPLICAS, integer=True, raises=ConfigError)
        if len(self.devices) > self.replicas:
            raise ConfigError(
                f"devices: got {len(self.devices)}, expected at most one for each of `replicas` ({self.replicas})"
            )

    @property
    def replica_devices(self) -> tuple[str, ...]:
        """The device of each replica."""
        devices = self.devices or (self.device,)
        return tuple(devices[number % len(devices)] for number in range(self.replicas))

    @property
    def edges(self) -> dict[str, EdgeConfig]:
        """`inputs`, every one as an EdgeConfig."""
        return {port: EdgeConfig(edge) if isinstance(edge, str) else edge for port, edge in self.inputs.items()}


@dataclass(frozen=True, slots=True)
class OmniConfig:
    """Everything that a YAML says."""

    name: str = "omni"
    model: str | None = None  # what `${model}` stands for in the stages
    stages: Mapping[str, StageConfig] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()  # stages (their text, images or audio) and "stage.port" tensors
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    dit_cache: DiTCacheConfig = field(default_factory=DiTCacheConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    max_memory_gb: float = 16.0  # for weights, KV pools and caches of all stages
    max_gpu_utilization: float = 0.8  # the share of an accelerator's memory that may be planned for
    threads: int | None = None  # of torch on the CPU, in the whole process; None leaves it at all cores
    request_timeout: float = math.inf  # seconds that a request may take when it does not say itself
    worker_timeout: float = 60.0  # seconds that a stage may hold work without progress before its requests fail

    def validate(self) -> None:
        """Checks every number; raises ConfigError with the key, what it got and what was expected."""
        check_number("resources.max_memory_gb", self.max_memory_gb, 0, MAX_GB, above_low=True, raises=ConfigError)
        check_number(
            "resources.max_gpu_utilization", self.max_gpu_utilization, 0, 1, above_low=True, raises=ConfigError
        )
        if self.threads is not None:
            check_number("resources.threads", self.threads, 1, MAX_THREADS, integer=True, raises=ConfigError)
        if self.request_timeout != math.inf:  # which is none
            check_number("scheduler.request_timeout_s", self.request_timeout, 0, above_low=True, raises=ConfigError)
        check_number("scheduler.worker_timeout_s", self.worker_timeout, 0, above_low=True, raises=ConfigError)
        check_number("scheduler.max_queue_size", self.scheduler.max_queue_size, 1, integer=True, raises=ConfigError)
        check_number("scheduler.max_running", self.scheduler.max_running, 1, integer=True, raises=ConfigError)
        check_number("dit_cache.max_memory_mb", self.dit_cache.max_memory_mb, 0, MAX_MB, raises=ConfigError)
        check_number("dit_cache.prompt_embeds_mb", self.dit_cache.prompt_embeds_mb, 0, MAX_MB, raises=ConfigError)
        check_number("dit_cache.encoded_images_mb", self.dit_cache.encoded_images_mb, 0, MAX_MB, raises=ConfigError)
        check_number("limits.max_prompt_chars", self.limits.max_prompt_chars, 1, integer=True, raises=ConfigError)
        check_number("limits.max_pixels", self.limits.max_pixels, 1, integer=True, raises=ConfigError)
        check_number("limits.max_frames", self.limits.max_frames, 1, integer=True, raises=ConfigError)
        check_number("limits.max_total_pixels", self.limits.max_total_pixels, 1, integer=True, raises=ConfigError)
        check_number("limits.max_inference_steps", self.limits.max_inference_steps, 1, integer=True, raises=ConfigError)
        check_number("limits.max_guidance_scale", self.limits.max_guidance_scale, 0, raises=ConfigError)
        check_number("limits.max_outputs", self.limits.max_outputs, 1, integer=True, raises=ConfigError)
        check_number("limits.max_duration_s", self.limits.max_duration_s, 0, above_low=True, raises=ConfigError)
        check_number("limits.max_audio_s", self.limits.max_audio_s, 0, above_low=True, raises=ConfigError)
        check_number("limits.max_audio_mb", self.limits.max_audio_mb, 0, MAX_MB, above_low=True, raises=ConfigError)
        check_number("limits.max_image_pixels", self.limits.max_image_pixels, 1, integer=True, raises=ConfigError)
        check_number("limits.max_images", self.limits.max_images, 0, integer=True, raises=ConfigError)
        check_number("limits.max_video_s", self.limits.max_video_s, 0, above_low=True, raises=ConfigError)
        check_number("limits.max_video_frames", self.limits.max_video_frames, 1, integer=True, raises=ConfigError)
        check_number("limits.max_video_mb", self.limits.max_video_mb, 0, MAX_MB, above_low=True, raises=ConfigError)
        for name, weight in self.scheduler.priority_weights.items():
            check_number(f"scheduler.priority_weights.{name}", weight, 0, above_low=True, raises=ConfigError)
        _check_policy(self.scheduler.policy)
        if "normal" not in self.scheduler.priority_weights:
            raise ConfigError("scheduler.priority_weights: 'normal' is missing; requests that name no priority have it")


def _check_policy(policy: object) -> None:
    known = registry.names("scheduling policy")
    if policy not in known:
        near = did_you_mean(policy, known) if isinstance(policy, str) else ""
        hint = near if near.startswith(" (did") else ""
        expected = ", ".join(map(repr, known))
        raise ConfigError(f"scheduler.policy: got {brief(policy)}, expected one of {expected}{hint}")
