"""Two small stage kinds without weights, for tests of configs, graphs and the command line.

`echo` says the prompt again and gives "states" [T, width], one row per word; `upper` needs text and capitalises it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from vllm_omni import registry
from vllm_omni.engine.base import Activity, EngineContext, MemoryPlan, ReadPorts, StageEngine, StageSpec
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.messages import StageDone, StageEvent, StageTask
from vllm_omni.params import StageParams
from vllm_omni.payload import StagePayload, StageSignature, TensorSpec, TextSpec
from vllm_omni.request import OmniRequest


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


class ToySpec(StageSpec):
    """What both kinds share."""

    params_type = ToyParams
    engine_type: type[ToyEngine]

    def load(self, context: EngineContext) -> StageEngine:
        return self.engine_type(self, context)

    def plan_memory(self) -> MemoryPlan:
        return MemoryPlan(weights_bytes=3 << 20, kv_pool_bytes=1 << 20, activation_bytes=512 << 10)

    def weights_key(self) -> tuple[str, ...]:
        return (self.stage.kind, self.stage.model or f"of {self.stage.name} alone")

    def check(self, request: OmniRequest, params: StageParams, reads: ReadPorts) -> None:
        if not isinstance(request.prompt, str):
            raise InvalidRequestError("prompt: expected text")


class ToyEngine(StageEngine):
    """One submitted task is done per step; subclasses say what is done."""

    def __init__(self, spec: StageSpec, context: EngineContext) -> None:
        self.stage = spec.stage
        self.context = context
        self._tasks: list[StageTask] = []

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

    def activity(self) -> Activity:
        return Activity.BUSY if self._tasks else Activity.IDLE

    def _payload(self, task: StageTask, text: str) -> StagePayload:
        tensors = {}
        if "states" in self.context.reads.whole:
            tensors["states"] = torch.ones(len(text.split()), self.stage.options.width)
        completion = {"text": text, "token_ids": [], "finish_reason": "stop"}
        return StagePayload(task.request_id, self.stage.name, tensors, {"text": text, "completions": [completion]})


class EchoStage(ToyEngine):
    def say(self, task: StageTask) -> str:
        return " ".join([str(task.request.prompt)] * (task.params.repeat or 1))


class UpperStage(ToyEngine):
    def say(self, task: StageTask) -> str:
        return str(task.inputs["text"]).upper()


class EchoSpec(ToySpec):
    options_type = EchoOptions
    engine_type = EchoStage

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        stage = self.stage
        if stage.model is not None and not stage.model.startswith("toy"):
            raise ConfigError(f"model: got {stage.model!r}, expected a toy")
        if stage.options.width > 4096:
            raise ConfigError(f"width: got {stage.options.width}, expected at most 4096")
        outputs = {"text": TextSpec(), "states": TensorSpec(("T", stage.options.width))}
        self.signature = StageSignature(outputs=outputs, results=frozenset({"text"}))


class UpperSpec(ToySpec):
    options_type = UpperOptions
    engine_type = UpperStage

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.signature = StageSignature(
            inputs={"text": TextSpec(), "states": TensorSpec(("T", self.stage.options.width))},
            outputs={"text": TextSpec()},
            required_inputs=frozenset({"text"}),
            results=frozenset({"text"}),
        )


def register_toys() -> None:
    """Adds the rows; may be called twice."""
    registry.register("stage kind", "echo", f"{__name__}:EchoSpec")
    registry.register("stage kind", "upper", f"{__name__}:UpperSpec")


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
