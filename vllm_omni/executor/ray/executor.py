"""The loop's half of a stage that is an actor of a Ray cluster, on this machine or another.

Orders are calls that nobody waits for. A thread of each executor waits for the actor's reports, and wakes the loop.
"""

from __future__ import annotations

import dataclasses
import logging
import traceback
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from vllm_omni.config.schema import OmniConfig
from vllm_omni.engine.base import EngineContext, StageSpec
from vllm_omni.engine.boundary import clear_frames
from vllm_omni.errors import StageError
from vllm_omni.executor.blueprint import StageBlueprint
from vllm_omni.executor.commons import Commons
from vllm_omni.executor.heard import SHUTDOWN_S, HeardExecutor
from vllm_omni.executor.orders import Report, StageOrder
from vllm_omni.executor.process.protocol import Loaded, LogLine, Surroundings
from vllm_omni.executor.ray.cluster import EXECUTOR, PlacedActor, num_gpus_of, resources_of
from vllm_omni.executor.ray.connection import check_installed
from vllm_omni.executor.ray.frame import Frame, memory_of, opened, opened_remotely, packed
from vllm_omni.executor.ray.protocol import Whereabouts, actor_types, lost
from vllm_omni.executor.ray.remote_tensor import content_of
from vllm_omni.executor.wire.base import WireError
from vllm_omni.messages import StageDone, StageEvent, StageFailed, StageProgress, StageRows
from vllm_omni.payload import StagePayload
from vllm_omni.utils.device import device_given

START_S = 120.0  # the most that is waited for free resources and a process, with its large imports from a slow disk
MAX_STARTS = 3
LOAD_S = 60.0  # without a sign of life, after which an actor that loads counts as hanging
SILENT_S = 10.0  # ... after which any does
MAX_BESIDE_BYTES = 100 * 1024  # of one array that goes along with a call
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
        self._read_here = _ports_read_here(spec, blueprint.config)
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
        content, *parts = packed(self._portable(order), self._types)
        with self._changed:
            if self._actor is None:
                raise StageError(f"stage {self._stage.name!r}: not started, or shut down")
            self._actor.handle.order.remote(
                self._num_sent, order.request_id, content, [_stored(part) for part in parts]
            )

    def _main(self) -> None:
        try:
            for is_last in [*[False] * (MAX_STARTS - 1), True]:
                actor = self._start()
                if actor is None or self._has_run(actor, is_last):
                    return
        except Exception as error:
            clear_frames(error)
            self._end(error)

    def _has_run(self, actor: PlacedActor, is_last: bool) -> bool:
        """Listens to it until it ends. False for one that has ended before it began: Ray puts actors on a node until it
        knows that this is dead. is_last: then that is raised too.
        """
        try:
            self._listen(actor.handle)
        except StageError as error:
            if is_last or self._where is not None or error.__cause__ is None:
                raise
            with self._changed:
                is_mine, self._actor = self._actor is actor, None
            if is_mine:
                self._cluster.end(actor)
            return not is_mine
        return True

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

        coming = handle.reports.options(num_returns="streaming").remote()
        while not self._is_stopping:
            try:
                found = ray.get(self._next(coming))
                if found is None:
                    continue
                content, num_parts = found
                frame = [content, *(self._next(coming) for _ in range(num_parts))]
            except ray.exceptions.RayError as error:
                raise StageError(f"its actor{self._at} has ended: {_in_short(error)}") from error
            self._take(frame)

    def _next(self, coming: Any) -> Any:
        """What the actor says next, as an object."""
        import ray

        patience_s = self._patience_s()
        if not ray.wait([coming], timeout=patience_s, fetch_local=False)[0]:
            raise StageError(self._silence(patience_s))
        return next(coming)

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

    def _take(self, frame: Frame) -> None:
        message = opened_remotely(frame, self._types, _fetched)
        if isinstance(message, Whereabouts):
            self._where = message
        elif isinstance(message, LogLine):
            logging.getLogger(message.logger).log(message.level, "%s: %s", self._stage.name, message.text)
        elif isinstance(message, Loaded):
            if message.error is not None:
                words = "".join(traceback.format_exception_only(message.error)).strip()
                raise StageError(f"its actor{self._at} could not load it: {words}") from message.error
            self.num_models = message.num_models
            self._loaded.set_result(None)
            self._wake()
        elif isinstance(message, Report):
            self._hear(self._brought_here(message, frame))
        else:
            raise WireError(f"got a {type(message).__name__} from its actor, expected a report")

    def _brought_here(self, report: Report, frame: Frame) -> Report:
        """The same, with the content of what only other actors read left where it is."""
        if report.answers:
            content, *objects = frame
            arrays: Report = opened([content, *_arrays(objects)], self._types)
            return arrays
        return dataclasses.replace(report, events=[self._event_here(event) for event in report.events])

    def _event_here(self, event: StageEvent) -> StageEvent:
        if isinstance(event, StageRows) and event.port in self._read_here:
            return dataclasses.replace(event, rows=content_of(event.rows))
        if isinstance(event, StageProgress) and event.previews is not None:
            return dataclasses.replace(event, previews=content_of(event.previews))
        if isinstance(event, StageDone):
            return dataclasses.replace(event, payload=_payload_here(event.payload, self._read_here))
        if isinstance(event, StageFailed) and event.made is not None:
            return dataclasses.replace(event, made=_payload_here(event.made, event.made.tensors.keys()))
        return event

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


def _ports_read_here(spec: StageSpec, config: OmniConfig) -> frozenset[str]:
    """Those whose content somebody beside the loop reads: a caller, or a stage that is no actor."""
    me, ports = spec.stage.name, set[str]()
    for entry in config.outputs:
        stage, _, port = entry.partition(".")
        if stage == me:
            ports |= {port} if port else spec.signature.results
    for stage_config in config.stages.values():
        if stage_config.executor != EXECUTOR:
            sources = (edge.source.partition(".") for edge in stage_config.edges.values())
            ports |= {port for stage, _, port in sources if stage == me}
    return frozenset(ports)


def _payload_here(payload: StagePayload, ports: Collection[str]) -> StagePayload:
    tensors = {port: content_of(tensor) if port in ports else tensor for port, tensor in payload.tensors.items()}
    return dataclasses.replace(payload, tensors=tensors)


def _stored(part: Any) -> Any:
    """A part of a frame as it goes along with a call: large ones as objects."""
    import ray

    return ray.put(part) if isinstance(part, np.ndarray) and part.nbytes > MAX_BESIDE_BYTES else part


def _arrays(objects: Sequence[Any]) -> list[Any]:
    import ray

    try:
        found: list[Any] = ray.get(list(objects))
    except ray.exceptions.RayError as error:
        raise lost(error) from error
    return found


def _fetched(found: Any) -> Tensor:
    (array,) = _arrays([found])
    return memory_of(array)()


def _in_short(error: Exception) -> str:
    """Ray's explanation, in one line."""
    words = " ".join(str(error).split())
    return words if len(words) <= MAX_WORDS else f"{words[:MAX_WORDS]} ..."
