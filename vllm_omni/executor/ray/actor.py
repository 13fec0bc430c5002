"""The actor of one stage: loads the engine, serves it in a thread of its own, and reports to whoever asks for reports.

All that its methods take and give are frames: bytes and uint8 arrays.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_omni.engine.base import Activity
from vllm_omni.errors import DataLostError, StageError
from vllm_omni.executor.blueprint import StageBlueprint
from vllm_omni.executor.hosting import Preparing, settle
from vllm_omni.executor.orders import Refuse, Report, StageOrder
from vllm_omni.executor.process.protocol import Loaded, Surroundings
from vllm_omni.executor.ray.frame import Frame, opened, packed
from vllm_omni.executor.ray.protocol import Whereabouts, actor_types, lost
from vllm_omni.executor.servant import StageServant
from vllm_omni.executor.wire.base import WireError
from vllm_omni.worker.background import Background
from vllm_omni.worker.model_pool import ModelPool

QUIET_S = 2.0  # after which `reports` gives a sign of life


class StageActor:
    """Ray calls its methods in several threads; what they share is guarded by `_changed`. It ends when it is killed."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._types = actor_types()
        self._changed = threading.Condition()
        self._orders: dict[int, Frame | Refuse] = {}  # by number: Ray does not promise the order of calls
        self._next = 0  # the number of the order that is to be carried out next
        self._reports: list[Frame] = []

    def __repr__(self) -> str:
        return f"stage {self._stage}"  # what Ray writes in front of lines that are printed

    def load(self, surroundings: Frame, blueprint: Frame) -> None:
        """Begins to load the engine; `reports` says when that is done."""
        threading.Thread(target=self._main, args=(surroundings, blueprint), name="omni-stage", daemon=True).start()

    def order(self, number: int, request_id: str, content: bytes, parts: list[Any]) -> None:
        """Takes an order; they are carried out by number, from 0 on. request_id: of the task that it is about. parts:
        arrays, or objects that hold one, which are fetched here.
        """
        try:
            order: Frame | Refuse = [content, *_fetched(parts)]
        except DataLostError as error:
            order = Refuse(request_id, error)
        with self._changed:
            self._orders[number] = order
            self._changed.notify_all()

    def reports(self) -> Iterator[Any]:
        """As they come: of each frame the bytes, with the number of its arrays, then these; after a while without any
        None, as a sign of life. What is yielded belongs to the caller: it is there when this actor is gone.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._reports, QUIET_S)
                reports, self._reports = self._reports, []
            if not reports:
                yield None
            for content, *arrays in reports:
                yield content, len(arrays)
                yield from (array for array in arrays)  # a generator, as Ray sends to it

    def _main(self, surroundings: Frame, blueprint: Frame) -> None:
        try:
            self._report(_whereabouts())
            found = self._set_up(surroundings, blueprint)
            background = Background(self._notify)
            spec = found.describe()
            models = ModelPool()
            engine = found.load(spec, background, models)
        except BaseException as error:
            self._report(Loaded(error))
            return
        self._report(Loaded(num_models=len(models)))
        try:
            self._serve(StageServant(found.stage, engine, Preparing(spec, found)))
        except BaseException as error:  # such as SystemExit of a step
            ended = StageError(f"its actor was ended by {type(error).__name__}: {error}")
            self._report(Report(0, Activity.IDLE.value, breakdown=ended))

    def _set_up(self, surroundings: Frame, blueprint: Frame) -> StageBlueprint:
        found: Surroundings = opened(surroundings, self._types)
        if Path(found.folder).is_dir():  # relative paths begin there; on another machine perhaps it is missing
            os.chdir(found.folder)
        sys.path += [path for path in found.sys_path if path not in sys.path]
        settle(found, self._report)
        self._types = actor_types(found.kinds)
        stage: StageBlueprint = opened(blueprint, self._types)
        return stage

    def _serve(self, servant: StageServant) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next in self._orders or servant.has_work())
                frames = []
                while self._next in self._orders:
                    frames.append(self._orders.pop(self._next))
                    self._next += 1
            orders: list[StageOrder] = [
                frame if isinstance(frame, Refuse) else opened(frame, self._types) for frame in frames
            ]
            news = servant.news()
            if news is not None:
                self._report(news)
            report = servant.turn(orders)
            try:
                self._report(report)
            except WireError as error:
                self._report(servant.unsent(report, error))
            if report.breakdown is not None:
                return

    def _report(self, message: object) -> None:
        frame = packed(message, self._types)
        with self._changed:
            self._reports.append(frame)
            self._changed.notify_all()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _fetched(parts: list[Any]) -> list[Any]:
    import ray

    objects = [part for part in parts if isinstance(part, ray.ObjectRef)]
    try:
        found = iter(ray.get(objects))
    except ray.exceptions.RayError as error:
        raise lost(error) from error
    return [next(found) if isinstance(part, ray.ObjectRef) else part for part in parts]


def _whereabouts() -> Whereabouts:
    import ray

    return Whereabouts(ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id(), os.getpid())
