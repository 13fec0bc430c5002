"""What an AR stage is for: how a task becomes sequences, what these are fed, and what comes of their tokens. The engine
itself only schedules, runs and samples, and knows no difference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_omni.config.schema import StageConfig
from vllm_omni.core.ar.scheduler import Chunk
from vllm_omni.core.ar.sequence import Sequence
from vllm_omni.engine.ar.options import AROptions, KVPoolPlan
from vllm_omni.engine.base import EngineContext, StageEvent, StageTask
from vllm_omni.errors import StageError
from vllm_omni.layers.sampler import SampledToken, SamplingRow
from vllm_omni.layers.token_inputs import TokenInputs
from vllm_omni.params import StageParams
from vllm_omni.payload import StageSignature, StreamChunk
from vllm_omni.request import OmniRequest
from vllm_omni.worker.ar.language_model import LanguageModelConfig
from vllm_omni.worker.ar.model_runner import ModelRunner


class ARJob(ABC):
    """One task at work. sequences: those that exist by now; a job may make them when its inputs have come."""

    def __init__(self, task: StageTask) -> None:
        self.task = task
        self.sequences: list[Sequence] = []
        self.num_steps = 0
        self._is_paused = False

    @property
    def is_paused(self) -> bool:
        return self._is_paused

    @is_paused.setter
    def is_paused(self, value: bool) -> None:
        self._is_paused = value
        for sequence in self.sequences:
            sequence.is_paused = value

    def feed(self, port: str, chunk: StreamChunk) -> list[StageEvent]:
        """Takes a chunk of a streamed input; raises what is wrong with it."""
        raise StageError(f"stage input {port!r} is not streamed")

    def inputs_of(self, chunk: Chunk) -> TokenInputs | None:
        """What the tokens of a chunk are besides their ids; may raise what is wrong with this task."""
        return None

    @abstractmethod
    def row_of(self, sequence: Sequence) -> SamplingRow:
        """How a sequence that writes samples."""

    @abstractmethod
    def take(self, sequence: Sequence, token: SampledToken | None) -> list[StageEvent]:
        """Tokens of a sequence have been computed, and perhaps one sampled."""

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
        """The payload's."""

    @abstractmethod
    def metrics(self) -> dict[str, int]:
        """Counts for the caller; `tokens` and `cache_hits` among them."""


class ARWork(ABC):
    """One stage's work. Constructing it reads side files, never weights of its model.

    tapped_layers: indices into `hidden_states` that its jobs read. can_write: whether its jobs sample.
    """

    tapped_layers: frozenset[int]
    can_write: bool
    prefix_caching: bool

    @classmethod
    @abstractmethod
    def signature(cls, stage: StageConfig, folder: Path, model: LanguageModelConfig) -> StageSignature:
        """As of StageEngine."""

    @classmethod
    @abstractmethod
    def request_keys(cls, options: AROptions) -> frozenset[str]:
        """As of StageEngine."""

    @abstractmethod
    def __init__(
        self,
        stage: StageConfig,
        context: EngineContext,
        folder: Path,
        model: LanguageModelConfig,
        pool: KVPoolPlan,
    ) -> None: ...

    @abstractmethod
    def check(self, request: OmniRequest, params: StageParams) -> None:
        """As of StageEngine."""

    @abstractmethod
    def start(self, task: StageTask, sequence_ids: Iterator[int], runner: ModelRunner) -> ARJob:
        """A job for a task, its streamed inputs not looked at yet; raises what is wrong with the task."""

    @abstractmethod
    def job_size(self, request: OmniRequest, params: StageParams) -> float:
        """In forward passes of one token, a prompt token counting a tenth."""
