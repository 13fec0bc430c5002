"""Two small real stage kinds: "toy_text" writes words step by step, "toy_picture" paints from a text's states.

They misbehave on demand, by request or by option, in every way that a stage can. `register_toys` adds their rows.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_omni import registry
from vllm_omni.config.schema import OmniConfig, SchedulerConfig, StageConfig
from vllm_omni.engine.base import Activity, EngineContext, MemoryPlan, ReadPorts, StageEngine, StageSpec
from vllm_omni.errors import InvalidRequestError, ResourceError
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.messages import StageDone, StageEvent, StageFailed, StageProgress, StageTask
from vllm_omni.params import StageParams
from vllm_omni.payload import StagePayload, StageSignature, TensorSpec, TextSpec
from vllm_omni.request import OmniRequest

WIDTH = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TextParams(StageParams):
    """steps (2). do: how the task misbehaves, see ToyEngine."""

    steps: int | None = None
    do: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureParams(StageParams):
    """steps (2), seed (0), num_outputs (1), guided (False): whether the second input is read. do: see ToyEngine."""

    steps: int | None = None
    seed: int | None = None
    num_outputs: int | None = None
    guided: bool | None = None
    do: str | None = None


@dataclass(frozen=True, slots=True)
class ToyOptions:
    """weights_bytes: for the memory plan. step_s, load_s: how long a step takes, or loading. fails_to_load, is_broken:
    who raises.
    """

    weights_bytes: int = 1000
    step_s: float = 0.0
    load_s: float = 0.0
    fails_to_load: bool = False
    is_broken: bool = False


@dataclass(slots=True)
class Work:
    task: StageTask
    step: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


class ToySpec(StageSpec):
    """A task's `do` may be reject or reject_bug, which `check` does."""

    options_type = ToyOptions
    params_type: type[Any] = TextParams
    engine_type: type[Any]

    def load(self, context: EngineContext) -> StageEngine:
        return self.engine_type(self, context)

    def plan_memory(self) -> MemoryPlan:
        return MemoryPlan(weights_bytes=self.stage.options.weights_bytes)

    def weights_key(self) -> tuple[str, ...]:
        return (self.stage.kind, self.stage.model or f"of {self.stage.name} alone")

    def check(self, request: OmniRequest, params: Any, reads: ReadPorts) -> None:
        if params.do == "reject":
            raise InvalidRequestError("do: got 'reject', expected something else")
        if params.do == "reject_bug":
            raise KeyError("oops")
        if params.steps is not None and params.steps > 1000:
            raise ResourceError(f"steps: got {params.steps}, expected at most 1000")

    def job_size(self, request: OmniRequest, params: Any, prepared: object) -> float:
        return float(params.steps or 2)


class ToyEngine(StageEngine):
    """One step for every task per call. A task's `do` makes it misbehave:

    fail, raise (from step), raise_once, lose (forgotten without an event), hang (no more
    events), block (a step that does not end before `released` is set), interrupt (Ctrl-C, once), exit (SystemExit),
    no_memory (torch's error), no_host_memory (the CPU allocator's), no_output, bad_image.
    """

    released = threading.Event()

    def __init__(self, spec: StageSpec, context: EngineContext) -> None:
        options: ToyOptions = spec.stage.options
        time.sleep(options.load_s)
        if options.fails_to_load:
            raise RuntimeError("weights are on fire")
        self.stage = spec.stage
        self.options = options
        self.wanted = context.reads.whole
        self.work: dict[str, Work] = {}
        self.num_steps = 0
        self.max_batch = 0
        self.raised: set[str] = set()

    def submit(self, task: StageTask) -> None:
        if task.request_id in self.work:
            raise ValueError(f"{task.request_id} was submitted twice")
        self.work[task.request_id] = Work(task)

    def step(self) -> list[StageEvent]:
        time.sleep(self.options.step_s)
        self.num_steps += 1
        self.max_batch = max(self.max_batch, len(self.work))
        events: list[StageEvent] = []
        for request_id, work in list(self.work.items()):
            events += self._advance(request_id, work)
        return events

    def abort(self, request_id: str) -> None:
        self.work.pop(request_id, None)

    def activity(self) -> Activity:
        return Activity.BUSY if self.work else Activity.IDLE

    def get_stats(self) -> dict[str, Any]:
        return {"steps": self.num_steps, "max_batch": self.max_batch}

    def check_integrity(self) -> None:
        if self.options.is_broken:
            raise RuntimeError("the counts do not add up")

    def _advance(self, request_id: str, work: Work) -> list[StageEvent]:
        params: Any = work.task.params
        if params.do == "hang":
            return []
        work.step += 1
        if work.step == 2 or params.steps == 1:
            self._misbehave(request_id, params.do)
        if params.do == "lose":
            del self.work[request_id]
            return []
        if params.do == "fail":
            del self.work[request_id]
            return [StageFailed(request_id, InvalidRequestError("it had to fail"))]
        num_steps = params.steps or 2
        progress = StageProgress(request_id, work.step, num_steps, self.words(work))
        if work.step < num_steps:
            return [progress]
        del self.work[request_id]
        payload = self.make(work.task)
        if params.do == "no_output":
            payload = StagePayload(request_id, self.stage.name)
        return [progress, StageDone(payload, {"steps": work.step})]

    def _misbehave(self, request_id: str, do: str | None) -> None:
        if do == "raise" or (do == "raise_once" and request_id not in self.raised):
            self.raised.add(request_id)
            raise RuntimeError("boom")
        if do == "block":
            self.released.wait()
        if do == "exit":
            raise SystemExit("leaving")
        if do == "no_memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if do == "no_host_memory":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        if do == "interrupt" and request_id not in self.raised:
            self.raised.add(request_id)
            signal.raise_signal(signal.SIGINT)

    def partial_result(self, request_id: str) -> StagePayload | None:
        """The words so far, one completion."""
        work = self.work.get(request_id)
        if work is None or not work.step:
            return None
        text = self.words(work) * work.step
        completion = {"text": text, "token_ids": [ord(letter) for letter in text], "finish_reason": None}
        return StagePayload(request_id, self.stage.name, meta={"completions": [completion]} if text else {})

    def words(self, work: Work) -> str:
        return ""

    def make(self, task: StageTask) -> StagePayload:
        raise NotImplementedError


class TextEngine(ToyEngine):
    """Repeats the prompt once per step; its states are the letters' codes. Reads another's words where connected."""

    def words(self, work: Work) -> str:
        return self._prompt(work.task)

    def make(self, task: StageTask) -> StagePayload:
        text = self._prompt(task) * (task.params.steps or 2)  # type: ignore[attr-defined]
        states = torch.tensor([[float(ord(letter))] * WIDTH for letter in text] or [[0.0] * WIDTH])
        tensors = {"states": states} if "states" in self.wanted else {}
        completion = {"text": text, "token_ids": [ord(letter) for letter in text], "finish_reason": "stop"}
        return StagePayload(task.request_id, self.stage.name, tensors, {"text": text, "completions": [completion]})

    def _prompt(self, task: StageTask) -> str:
        return str(task.inputs.get("words", task.request.prompt))


class PictureEngine(ToyEngine):
    """A plain picture, grey as the mean of the states it read plus the seed, and its latents."""

    def make(self, task: StageTask) -> StagePayload:
        params: Any = task.params
        mean = torch.cat([states.mean(0, keepdim=True) for _, states in sorted(task.inputs.items())]).mean()
        latents = (mean + (params.seed or 0)).expand(params.num_outputs or 1, WIDTH).clone()
        grey = (latents[:, 0] % 256).to(torch.uint8)
        image = grey[:, None, None, None].expand(-1, 8, 8, 3).clone()
        tensors = {"image": image, "latents": latents}
        if params.do == "bad_image":
            tensors["image"] = image.float()
        wanted = {port: tensor for port, tensor in tensors.items() if port in self.wanted}
        return StagePayload(task.request_id, self.stage.name, wanted)


class TextSpecimen(ToySpec):
    """Of a TextEngine."""

    engine_type = TextEngine

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        outputs = {"text": TextSpec(), "states": TensorSpec(("T", WIDTH))}
        self.signature = StageSignature({"words": TextSpec()}, outputs, results=frozenset({"text"}))

    def cache_key(self, task: StageTask) -> str | None:
        key = f"{task.inputs.get('words')}|{task.request.prompt}|{task.params}"
        return key if "text" not in self.stage.name else None


class PictureSpecimen(ToySpec):
    """Of a PictureEngine."""

    params_type = PictureParams
    engine_type = PictureEngine

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        states = TensorSpec(("T", WIDTH))
        outputs = {"image": TensorSpec(("n", "H", "W", 3)), "latents": TensorSpec(("n", WIDTH))}
        inputs = {"states": states, "guide": states}
        self.signature = StageSignature(inputs, outputs, frozenset({"states"}), results=frozenset({"image"}))

    def needed_inputs(self, request: OmniRequest, params: Any) -> frozenset[str]:
        return frozenset(self.stage.inputs) if params.guided else frozenset({"states"})


def register_toys() -> None:
    registry.register("stage kind", "toy_text", "support.toy_engine:TextSpecimen")
    registry.register("stage kind", "toy_picture", "support.toy_engine:PictureSpecimen")


def toy_stage(name: str, kind: str, inputs: Mapping[str, str] | None = None, **options: Any) -> StageConfig:
    own = {key: options.pop(key) for key in list(options) if key in ToyOptions.__dataclass_fields__}
    return StageConfig(
        name=name, kind=kind, inputs=inputs or {}, device="cpu", dtype="float32", options=ToyOptions(**own), **options
    )


def toy_config(**changes: Any) -> OmniConfig:
    """encode -> picture, and a second encoder `guide` that only guided requests need; gives pictures and latents."""
    register_toys()
    stages = [
        toy_stage("encode", "toy_text"),
        toy_stage("guide", "toy_text"),
        toy_stage("picture", "toy_picture", {"states": "encode.states", "guide": "guide.states"}),
    ]
    defaults: dict[str, Any] = {
        "stages": {stage.name: stage for stage in stages},
        "outputs": ("picture", "picture.latents"),
        "scheduler": SchedulerConfig(),
    }
    config = OmniConfig(**{**defaults, **changes})
    Pipeline(config)
    return config


def text_config(step_s: float = 0.0, **changes: Any) -> OmniConfig:
    """One stage that writes."""
    stages = {"text": toy_stage("text", "toy_text", step_s=step_s)}
    return toy_config(**{"stages": stages, "outputs": ("text",), **changes})
