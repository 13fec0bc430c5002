"""The adapter stage: any pipeline of diffusers, hosted as it is. Each step runs one denoising step of one request; the
pictures and sounds that requests bring are read beside the loop meanwhile.

Requests run one after another, since a pipeline is made for one call at a time; a model that has a DiffusionModel of
its own (kind `dit`) runs them together.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vllm_omni.engine.base import Activity, EngineContext, StageEngine
from vllm_omni.engine.boundary import stage_error
from vllm_omni.engine.diffusers.call import request_generators
from vllm_omni.engine.diffusers.pipeline_host import PipelineHost, PipelineRun, with_own_modules
from vllm_omni.engine.diffusers.pipeline_loading import load_pipeline, sample_rate
from vllm_omni.engine.diffusers.pipeline_result import blanked, has_made, result_tensor
from vllm_omni.engine.diffusers.spec import DiffusersSpec
from vllm_omni.engine.diffusion.checks import diffusion_params
from vllm_omni.errors import InvalidRequestError, OmniError
from vllm_omni.messages import StageDone, StageEvent, StageFailed, StageProgress, StageTask
from vllm_omni.payload import StagePayload
from vllm_omni.worker.background import BackgroundJob, Stop


@dataclass(frozen=True, slots=True)
class _Call:
    """What a request asks of the pipeline, its pictures and sounds read."""

    arguments: dict[str, Any]
    num_steps: int
    generators: list[torch.Generator]
    meta: dict[str, Any]  # of the payload


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A request whose call has not begun."""

    task: StageTask
    call: BackgroundJob[_Call]


@dataclass(frozen=True, slots=True)
class _Running:
    """The request whose call is under way."""

    task: StageTask
    run: PipelineRun
    meta: dict[str, Any]  # of the payload


class DiffusersEngine(StageEngine):
    """Stage kind `diffusers`."""

    def __init__(self, spec: DiffusersSpec, context: EngineContext) -> None:
        folder, pipeline_type = spec.folder, spec.pipeline_type
        pipeline = context.models.get(
            (spec.pipeline_name, folder.path.resolve(), folder.variant or "", context.device, context.dtype),
            lambda: load_pipeline(folder, pipeline_type, context.device, context.dtype),
        )
        self.spec = spec
        self.host = PipelineHost(with_own_modules(pipeline))
        self._meta = {"sample_rate": sample_rate(pipeline)} if {"audio", "soundtrack"} & set(spec.ports) else {}
        self._background = context.background
        self._queue: deque[_Waiting] = deque()
        self._running: _Running | None = None
        self._events: deque[StageEvent] = deque()

    def submit(self, task: StageTask) -> None:
        self._queue.append(_Waiting(task, self._background.begin(partial(_read_call, self.spec, task))))

    def step(self) -> list[StageEvent]:
        if self._running is None and self._is_next_ready:
            self._begin(self._queue.popleft())
        if self._running is not None:
            self._advance(self._running)
        events, self._events = list(self._events), deque()
        return events

    def abort(self, request_id: str) -> None:
        for waiting in [each for each in self._queue if each.task.request_id == request_id]:
            waiting.call.cancel()
            self._queue.remove(waiting)
        if self._running is not None and self._running.task.request_id == request_id:
            run, self._running = self._running.run, None
            run.close()
            self.host.restore()

    def activity(self) -> Activity:
        if self._running is not None or self._is_next_ready or self._events:
            return Activity.BUSY
        return Activity.PENDING if self._queue else Activity.IDLE

    def get_stats(self) -> dict[str, Any]:
        return {"running": int(self._running is not None), "queued": len(self._queue)}

    @property
    def _is_next_ready(self) -> bool:
        """They begin in the order in which they came."""
        return bool(self._queue) and self._queue[0].call.is_done

    def _begin(self, waiting: _Waiting) -> None:
        task = waiting.task
        try:
            call = waiting.call.result()
            run = self.host.begin(call.arguments, call.num_steps, call.generators)
            self._running = _Running(task, run, {**self._meta, **call.meta})
        except Exception as error:
            self._fail(task.request_id, error)

    def _advance(self, running: _Running) -> None:
        request_id, run = running.task.request_id, running.run
        try:
            if not run.advance():
                self._events.append(StageProgress(request_id, run.step, run.num_steps))
                return
            result = run.result()
            tensors = {port: result_tensor(result, port) for port in self.spec.ports if has_made(result, port)}
        except Exception as error:
            self._fail(request_id, error)
            return
        self._running = None
        payload = StagePayload(request_id, self.spec.stage.name, tensors, running.meta)
        self._events.append(StageDone(payload, {"steps": run.step, **_blanked_metrics(result)}))

    def _fail(self, request_id: str, error: Exception) -> None:
        self.abort(request_id)
        wrapped = error if isinstance(error, OmniError) else stage_error(self.spec.stage.name, error)
        self._events.append(StageFailed(request_id, wrapped))


def _read_call(spec: DiffusersSpec, task: StageTask, stop: Stop) -> _Call:
    """Runs in a thread beside the loop, and knows no engine."""
    params, prompt = diffusion_params(task.params), task.inputs.get("prompt", task.request.prompt)
    if not isinstance(prompt, str):
        raise InvalidRequestError(f"prompt: got {type(prompt).__name__}, expected a string")
    params, generators = spec.with_fields(task.request, params), request_generators(params)
    arguments = spec.call.arguments(prompt, task.request, params, generators, stop)
    meta = {"fps": spec.call.fps(params)} if spec.output == "video" else {}
    return _Call(arguments, spec.call.num_steps(params), generators, meta)


def _blanked_metrics(result: Any) -> dict[str, Any]:
    """Which pictures a safety checker has made black, counted from 0; nothing where it let all through."""
    found = [index for index, is_blanked in enumerate(blanked(result)) if is_blanked]
    return {"blanked_by_safety_checker": found} if found else {}
