"""Ends the engines of a pipeline's stages at chosen steps, whichever engine it is by then: in a thread its thread ends
with it, in the loop's own its step raises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from typing import Any

from vllm_omni.engine.base import EngineContext, StageEngine
from vllm_omni.executor.pipeline import Pipeline


class Reaper:
    """plan: stage -> the steps, counted from 0 over all its engines since `begin`, at which one ends; with `after`,
    what they made is lost as well. loads: stage -> the loads that fail.
    """

    def __init__(self, pipeline: Pipeline, error: type[BaseException] = RuntimeError) -> None:
        self.error = error
        self.num_killed = 0
        self.begin({})
        for name, spec in pipeline.specs.items():
            self._watch(name, spec)

    def begin(
        self, plan: Mapping[str, Set[int]], *, after: bool = False, loads: Mapping[str, Set[int]] | None = None
    ) -> None:
        self.plan, self.is_after, self.loads = plan, after, loads or {}
        self.steps: Counter[str] = Counter()
        self.num_loads: Counter[str] = Counter()

    def _watch(self, name: str, spec: Any) -> None:
        load = spec.load

        def loaded(context: EngineContext) -> StageEngine:
            number = self.num_loads[name]
            self.num_loads[name] += 1
            if number in self.loads.get(name, ()):
                raise RuntimeError("killed while it loads")
            engine = load(context)
            self._haunt(name, engine)
            return engine

        spec.load = loaded

    def _haunt(self, name: str, engine: Any) -> None:
        step = engine.step

        def stepped() -> Any:
            number = self.steps[name]
            self.steps[name] += 1
            is_due = number in self.plan.get(name, ())
            if is_due and not self.is_after:
                self._kill()
            events = step()
            if is_due:
                self._kill()
            return events

        engine.step = stepped

    def _kill(self) -> None:
        self.num_killed += 1
        raise self.error("killed")
