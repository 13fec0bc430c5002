"""The loop's half of a stage that is an actor of a Ray cluster, on this machine or another.

Orders are calls that nobody waits for. A thread of each executor waits for the actor's reports, and wakes the loop.
"""

from __future__ import annotations

import dataclasses
import logging
import traceback
from collections.abc import Mapping
from typing import Any

from vllm_omni.engine.base import EngineContext, StageSpec
from vllm_omni.engine.boundary import clear_frames
from vllm_omni.errors import StageError
from vllm_omni.executor.blueprint import StageBlueprint
from vllm_omni.executor.commons import Commons
from vllm_omni.executor.heard import SHUTDOWN_S, HeardExecutor
from vllm_omni.executor.orders import Report, StageOrder, Submit
from vllm_omni.executor.process.protocol import Loaded, LogLine, Surroundings
from vllm_omni.executor.ray.cluster import PlacedActor, num_gpus_of, resources_of
from vllm_omni.executor.ray.connection import check_installed
from vllm_omni.executor.ray.frame import opened, packed
from vllm_omni.executor.ray.protocol import Whereabouts, actor_types
from vllm_omni.executor.wire.base import WireError
from vllm_omni.utils.device import device_given

START_S = 120.0  # the most that is waited for free resources and a process, with its large imports from a slow disk
LOAD_S = 60.0  # without a sign of life, after which an actor that loads counts as hanging
SILENT_S = 10.0  # ... after which any does
MAX_WORDS = 1000  # characters of what Ray says of an actor's end


class RayExecutor(HeardExecutor):
    """An actor that dies, with its node or alone, hangs or cannot be had is a breakdown. A stage that is rebuilt has
    another one.
    """

    shares_memory = False

    def __init__(self, spec: StageSpec, context: EngineContext, commons: Commons, blueprint: StageBlueprint) -> None:
        check_installed()
        super().__init__(spec, context, commons, _for_actor(blueprint))
        self._stage = blueprint.config.stages[blueprint.stage]
        self._cluster = commons.cluster
        self._types = actor_types(stage.kind for stage in blueprint.config.stages.values())
        self._actor: PlacedActor | None = None
        self._where: Whereabouts | None = None

    def start(self) -> None:
        if self._thread is None:
            self._thread = self._cluster.run(self._main, f"omni-ray-{self._stage.name}")

    def place(self) -> Mapping[str, Any]:
        return {} if self._where is None else dataclasses.asdict(self._where)

    def shutdown(self, *, wait: bool = True) -> None:
        with self._changed:
            self._is_stopping = True
            actor, self._actor = self._actor, None
            self._changed.notify_all()
        if actor is not None:
            self._cluster.end(actor)
        if wait and self._thread is not None:
            self._thread.join(SHUTDOWN_S)

    def _send(self, order: StageOrder) -> None:
        frame = packed(order.for_another_process() if isinstance(order, Submit) else order, self._types)
        with self._changed:
            if self._actor is None:
                raise StageError(f"stage {self._stage.name!r}: not started, or shut down")
            self._actor.handle.order.remote(self._num_sent, *frame)

    def _main(self) -> None:
        try:
            actor = self._start()
            if actor is not None:
                self._listen(actor.handle)
        except Exception as error:
            clear_frames(error)
            self._end(error)

    def _start(self) -> PlacedActor | None:
        """None where nobody wants it any more."""
        config = self._blueprint.config
        actor = self._cluster.start(config, self._stage)
        with self._changed:
            if not self._is_stopping:
                self._actor = actor
        if self._actor is not actor:
            self._cluster.end(actor)
            return None
        surroundings = packed(Surroundings.of(config), actor_types())
        actor.handle.load.remote(surroundings, packed(self._blueprint, self._types))
        return actor

    def _listen(self, handle: Any) -> None:
        """Until the actor ends; what ends it is raised."""
        import ray

        while not self._is_stopping:
            coming = handle.reports.remote()
            patience_s = self._patience_s()
            if not ray.wait([coming], timeout=patience_s, fetch_local=False)[0]:
                raise StageError(self._silence(patience_s))
            try:
                frames = ray.get(coming)
            except ray.exceptions.RayError as error:
                raise StageError(f"its actor{self._at} has ended: {_in_short(error)}") from error
            for frame in frames:
                self._take(opened(frame, self._types))

    def _patience_s(self) -> float:
        if self._where is None:
            return START_S
        return SILENT_S if self._loaded.done() else LOAD_S

    def _silence(self, patience_s: float) -> str:
        if self._where is not None:
            return f"its actor{self._at} gave no sign of life for {patience_s:g} s"
        import ray

        asked, free = resources_of(self._stage), ray.available_resources()
        has = {name: free.get(name, 0) for name in asked}
        return f"its actor did not start within {patience_s:g} s; it asks for {asked}, and the cluster has {has} free"

    @property
    def _at(self) -> str:
        return "" if self._where is None else f" (process {self._where.pid} on {self._where.host})"

    def _take(self, message: Any) -> None:
        if isinstance(message, Whereabouts):
            self._where = message
        elif isinstance(message, LogLine):
            logging.getLogger(message.logger).log(message.level, "%s: %s", self._stage.name, message.text)
        elif isinstance(message, Loaded):
            if message.error is not None:
                words = "".join(traceback.format_exception_only(message.error)).strip()
                raise StageError(f"its actor{self._at} could not load it: {words}") from message.error
            self._loaded.set_result(None)
            self._wake()
        elif isinstance(message, Report):
            self._hear(message)
        else:
            raise WireError(f"got a {type(message).__name__} from its actor, expected a report")

    def _end(self, error: Exception) -> None:
        """The actor is of no use any more."""
        if not self._loaded.done():
            self._loaded.set_exception(error)
            self._wake()
        else:
            self._hear_of_breakdown(error)


def _for_actor(blueprint: StageBlueprint) -> StageBlueprint:
    """The device is the actor's own: of the GPUs it sees those alone that it was given. A CPU has as many threads as
    it was given, where the config says nothing else.
    """
    config = blueprint.config
    stage = config.stages[blueprint.stage]
    has_gpu = num_gpus_of(stage) > 0
    threads = None if has_gpu else config.threads or max(1, int(stage.ray.num_cpus))
    return dataclasses.replace(blueprint, device=device_given(has_gpu), threads=threads)


def _in_short(error: Exception) -> str:
    """Ray's explanation, in one line."""
    words = " ".join(str(error).split())
    return words if len(words) <= MAX_WORDS else f"{words[:MAX_WORDS]} ..."
