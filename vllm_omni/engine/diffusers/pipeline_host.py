"""Runs calls of a diffusers pipeline step by step, each on a pipeline object of its own over the same weights.

A call runs in a thread that hands control back at every denoising step (StepThread). What a pipeline keeps on itself
(guidance, step counts, schedulers) belongs to one call, its modules (attention processors, hooks) to one stage; weights
are shared by all.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_omni.engine.diffusers.step_thread import Pause, StepThread
from vllm_omni.errors import StageError
from vllm_omni.worker.diffusion.request_noise import RequestNoise


@dataclass(slots=True)
class _Progress:
    """Denoising steps of one call: done, and how many there will be as far as is known."""

    step: int
    num_steps: int


class PipelineRun:
    """One call under way. `advance` runs it to its next denoising step."""

    def __init__(
        self, pipeline: Any, arguments: Mapping[str, Any], num_steps: int, generators: Sequence[torch.Generator]
    ) -> None:
        self._progress = _Progress(0, num_steps)
        self._thread: StepThread[Any] = StepThread(
            _call(pipeline, dict(arguments), self._progress, generators), f"{type(pipeline).__name__} call"
        )

    @property
    def step(self) -> int:
        return self._progress.step

    @property
    def num_steps(self) -> int:
        return max(self._progress.step, self._progress.num_steps)

    def advance(self) -> bool:
        """Whether the call has ended; else it stands after one more denoising step."""
        return self._thread.resume()

    def result(self) -> Any:
        """What the pipeline returned, or raises what it raised."""
        return self._thread.result()

    def close(self) -> None:
        """Gives the call up at once and ends its thread."""
        self._thread.close()


class PipelineHost:
    """A loaded pipeline. One run at a time: a pipeline may set its weights' attention processors for a call."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self._attention = {
            name: dict(component.attn_processors)
            for name, component in pipeline.components.items()
            if hasattr(component, "attn_processors") and hasattr(component, "set_attn_processor")
        }

    def begin(self, arguments: Mapping[str, Any], num_steps: int, generators: Sequence[torch.Generator]) -> PipelineRun:
        """A call of the pipeline with these keyword arguments and callbacks of ours. Nothing runs yet. generators: one
        for each output; what the call draws without naming one comes from them.
        """
        return PipelineRun(self._fresh_pipeline(), arguments, num_steps, generators)

    def restore(self) -> None:
        """Undoes what a call that did not come to its end has left on the weights."""
        for name, processors in self._attention.items():
            component = self.pipeline.components[name]
            if component.attn_processors != processors:
                component.set_attn_processor(dict(processors))

    def _fresh_pipeline(self) -> Any:
        """The same modules, schedulers that nobody has used, nothing that a call before has left."""
        from diffusers import SchedulerMixin

        kept = [each for each in self.pipeline.components.values() if not isinstance(each, SchedulerMixin)]
        return copy.deepcopy(self.pipeline, {id(each): each for each in kept})


def with_own_modules(pipeline: Any) -> Any:
    """The same pipeline over the same weights, each module an object of its own: two stages that host one folder set
    attention processors and hooks without a trace in the other.
    """
    components = pipeline.components.values()
    modules = [each for each in components if isinstance(each, torch.nn.Module)]
    shared = [tensor for module in modules for part in module.modules() for tensor in _tensors(part)]
    shared += [each for each in components if _is_stateless(each)]
    return copy.deepcopy(pipeline, {id(each): each for each in shared})


def _tensors(module: torch.nn.Module) -> list[Any]:
    """Parameters, buffers, and what a module holds as a plain attribute (a weight that is normalised in each call)."""
    own = [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
    return [*module.parameters(recurse=False), *module.buffers(recurse=False), *own]


def _is_stateless(component: object) -> bool:
    """Tokenizers and feature extractors, which are slow to copy."""
    from diffusers import SchedulerMixin

    return not isinstance(component, (torch.nn.Module, SchedulerMixin))


class _CastWatch:
    """Takes numpy's notes: values that are not finite and become integers, as the pixels of a picture do, silently
    turn black.
    """

    def __init__(self) -> None:
        self.saw_lost_values = False

    def write(self, message: str) -> None:
        self.saw_lost_values = self.saw_lost_values or "in cast" in message


def _call(pipeline: Any, arguments: dict[str, Any], progress: _Progress, generators: Sequence[torch.Generator]) -> Any:
    """The call as a function of `pause`. It must not know the PipelineRun, which ends it when it is forgotten."""
    accepted = inspect.signature(type(pipeline).__call__).parameters

    def run(pause: Pause) -> Any:
        def after_step() -> None:
            progress.step += 1
            known = getattr(pipeline, "num_timesteps", None)
            progress.num_steps = known if isinstance(known, int) else progress.num_steps
            pause()

        def on_step_end(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            after_step()
            return tensors

        def legacy(_step: int, _timestep: Any, _latents: Any) -> None:
            after_step()

        if "callback_on_step_end" in accepted:
            arguments["callback_on_step_end"] = on_step_end
        elif "callback" in accepted and "callback_steps" in accepted:
            arguments.update(callback=legacy, callback_steps=1)
        if "prior_callback_on_step_end" in accepted:
            arguments["prior_callback_on_step_end"] = on_step_end
        watch = _CastWatch()
        with RequestNoise(generators), np.errstate(invalid="log", call=watch):
            result = pipeline(**arguments)
        if watch.saw_lost_values:
            raise StageError("the pixels are not finite; use dtype bfloat16 or float32, or a smaller guidance_scale")
        return result

    return run
