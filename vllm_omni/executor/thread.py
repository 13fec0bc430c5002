"""An executor that hosts its engine in a thread of its own, so that stages on different devices need not wait for each
other. Tensors pass by reference; which tasks share a batch depends on time.
"""

from __future__ import annotations

import dataclasses
import threading
from contextlib import closing

from vllm_omni.engine.base import EngineContext, StageSpec
from vllm_omni.errors import StageError
from vllm_omni.executor.blueprint import StageBlueprint
from vllm_omni.executor.commons import Commons
from vllm_omni.executor.heard import SHUTDOWN_S, HeardExecutor
from vllm_omni.executor.orders import StageOrder
from vllm_omni.executor.servant import StageServant
from vllm_omni.worker.background import Background


class ThreadExecutor(HeardExecutor):
    """The thread loads the engine, then has its servant carry out the orders that the caller queues, turn by turn.

    Everything that both threads touch is guarded by `_changed`; the servant belongs to the thread alone. A thread that
    is stuck in a step is left behind by `shutdown(wait=False)`; it ends when the step does, if ever.
    """

    def __init__(self, spec: StageSpec, context: EngineContext, commons: Commons, blueprint: StageBlueprint) -> None:
        self._background = Background(self._notify)
        super().__init__(spec, dataclasses.replace(context, background=self._background), commons, blueprint)
        self._orders: list[StageOrder] = []

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name=f"omni-{self._spec.stage.name}", daemon=True)
            self._thread.start()

    def shutdown(self, *, wait: bool = True) -> None:
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._background.shutdown()
        thread, self._thread = self._thread, None
        if wait and thread is not None:
            thread.join(SHUTDOWN_S)

    def _send(self, order: StageOrder) -> None:
        with self._changed:
            if self._thread is None or self._is_stopping:
                raise StageError(f"stage {self._spec.stage.name!r}: not started, or shut down")
            self._orders.append(order)
            self._changed.notify_all()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _main(self) -> None:
        try:
            engine = self._spec.load(self._context)
        except BaseException as error:
            self._loaded.set_exception(error)
            self._wake()
            return
        self._loaded.set_result(None)
        self._wake()
        try:
            with closing(engine):
                self._serve(StageServant(self._spec.stage.name, engine))
        except BaseException as error:  # such as SystemExit, which ends the thread alone
            self._hear_of_breakdown(StageError(f"its thread was ended by {type(error).__name__}: {error}"))

    def _serve(self, servant: StageServant) -> None:
        while self._breakdown is None:
            with self._changed:
                self._changed.wait_for(lambda: self._orders or self._is_stopping or servant.has_work())
                if self._is_stopping:
                    return
                orders, self._orders = self._orders, []
            self._hear(servant.news())
            self._hear(servant.turn(orders))
