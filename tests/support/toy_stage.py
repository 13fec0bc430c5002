"""Two small stage kinds without weights, for tests of configs, graphs and the command line.

`echo` says the prompt again and gives "states" [T, width], one row per word; `upper` needs text and capitalises it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from vllm_omni import registry
from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.engine.base import EngineContext, MemoryPlan, StageDone, StageEngine, StageEvent, StageTask
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.params import StageParams
from vllm_omni.payload import StagePayload, StageSignature, TensorSpec, TextSpec
from vllm_omni.request import Completion, OmniRequest


@dataclass(frozen=True, slots=True)
class Taps:
    layers: tuple[int, ...]
    tokens: Literal["all", "prompt", "completion"] = "all"


@dataclass(frozen=True, slots=True)
class Voice:
    loudness: float = 1.0
    accent: Literal["plain", "northern"] = "plain"

    def __post_init__(self) -> None:
        if self.loudness > 11:
            raise ConfigError(f"loudness: got {self.loudness}, expected at most 11")


@dataclass(frozen=True, slots=True)
class EchoOptions:
    width: int = 4
    voice: Voice = field(default_factory=Voice)
    taps: Mapping[str, Taps] = field(default_factory=dict)
    speaker: str | None = None
    pair: tuple[int, float] | None = None
    pool_mb: float = 1.0
    is_polite: bool = False


@dataclass(frozen=True, slots=True)
class UpperOptions:
    width: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyParams(StageParams):
    repeat: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.seed is not None and self.seed < 0:
            raise InvalidRequestError(f"seed: got {self.seed}, expected at least 0")
        if self.repeat is not None and not 1 <= self.repeat <= 9:
            raise InvalidRequestError(f"repeat: got {self.repeat}, expected 1 to 9")


class ToyEngine(StageEngine):
    """One submitted task is done per step; subclasses say what is done."""

    params_type = ToyParams

    def __init__(self, stage: StageConfig, context: EngineContext) -> None:
        self.stage = stage
        self.context = context
        self._tasks: list[StageTask] = []

    @classmethod
    def plan_memory(cls, stage: StageConfig, config: OmniConfig) -> MemoryPlan:
        return MemoryPlan(weights_bytes=3 << 20, kv_pool_bytes=1 << 20, activation_bytes=512 << 10)

    def check(self, request: OmniRequest, params: StageParams) -> None:
        if not isinstance(request.prompt, str):
            raise InvalidRequestError("prompt: expected text")

    def submit(self, task: StageTask) -> None:
        self._tasks.append(task)

    def step(self) -> list[StageEvent]:
        if not self._tasks:
            return []
        task = self._tasks.pop(0)
        return [StageDone(self._payload(task, self.say(task)), {"steps": 1})]

    def say(self, task: StageTask) -> str:
        raise NotImplementedError

    def abort(self, request_id: str) -> None:
        self._tasks = [task for task in self._tasks if task.request_id != request_id]

    def has_work(self) -> bool:
        return bool(self._tasks)

    def _payload(self, task: StageTask, text: str) -> StagePayload:
        tensors = {}
        if "states" in self.context.wanted:
            tensors["states"] = torch.ones(len(text.split()), self.stage.options.width)
        completion = Completion(text=text, token_ids=(), finish_reason="stop")
        return StagePayload(task.request_id, self.stage.name, tensors, {"text": text, "completions": [completion]})


class EchoStage(ToyEngine):
    options_type = EchoOptions

    @classmethod
    def signature(cls, stage: StageConfig) -> StageSignature:
        if stage.model is not None and not stage.model.startswith("toy"):
            raise ConfigError(f"model: got {stage.model!r}, expected a toy")
        if stage.options.width > 4096:
            raise ConfigError(f"width: got {stage.options.width}, expected at most 4096")
        outputs = {"text": TextSpec(), "states": TensorSpec(("T", stage.options.width))}
        return StageSignature(outputs=outputs, results=frozenset({"text"}))

    def say(self, task: StageTask) -> str:
        return " ".join([str(task.request.prompt)] * (task.params.repeat or 1))


class UpperStage(ToyEngine):
    options_type = UpperOptions

    @classmethod
    def signature(cls, stage: StageConfig) -> StageSignature:
        return StageSignature(
            inputs={"text": TextSpec(), "states": TensorSpec(("T", stage.options.width))},
            outputs={"text": TextSpec()},
            required_inputs=frozenset({"text"}),
            results=frozenset({"text"}),
        )

    def say(self, task: StageTask) -> str:
        return str(task.inputs["text"]).upper()


def register_toys() -> None:
    """Adds the rows; may be called twice."""
    registry.register("stage kind", "echo", f"{__name__}:EchoStage")
    registry.register("stage kind", "upper", f"{__name__}:UpperStage")


TOY_YAML = """\
name: toy
stages:
  source:
    kind: echo
    width: 4
  loud:
    kind: upper
    inputs: {text: source.text, states: source.states}
outputs: [loud, source.states]
"""
