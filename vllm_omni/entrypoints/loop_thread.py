"""One thread that runs an OmniExecutor's loop, and the only one that touches it. Knows no asyncio.

Requests are planned (prompts tokenised, headers of media read) in another thread, so that nobody's tokens wait for it.
Every request gets exactly one final output, also when the loop stops or dies.
"""

from __future__ import annotations

import atexit
import os
import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from vllm_omni.core.routing.request_plan import RequestPlan
from vllm_omni.entrypoints.prompts import rejected
from vllm_omni.errors import OmniError, SchedulerError
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.request import OmniOutput, OmniRequest, RequestStatus

Deliver = Callable[[OmniOutput], None]
T = TypeVar("T")
EXIT_S = 10.0  # the most that the end of the interpreter waits for a step to end


@dataclass(frozen=True, slots=True)
class _Command:
    """`execute` in the loop's thread, or `refuse` when the loop has ended: always exactly one of them."""

    execute: Callable[[], None]
    refuse: Callable[[OmniError], object]


class LoopThread:
    """All methods return at once and may be called from any thread.

    A `deliver` is called with each output of its request, in the loop's thread (in another, once that has ended).
    """

    def __init__(self, executor: OmniExecutor) -> None:
        self._executor = executor
        self._commands: deque[_Command] = deque()
        self._wake = threading.Condition()
        self._delivers: dict[str, Deliver] = {}
        self._planning = ThreadPoolExecutor(1, thread_name_prefix="omni-planning")
        self._is_stopping = False
        self._has_ended = False
        self.cause_of_death: BaseException | None = None  # what broke the loop
        self.finished: Future[None] = Future()  # done when the thread has ended
        self._process = os.getpid()
        executor.listen(self._notify)
        self._thread = threading.Thread(target=self._main, name="omni-loop", daemon=True)
        self._thread.start()
        atexit.register(self._leave)

    @property
    def is_alive(self) -> bool:
        """Whether the loop runs; a process that was forked off has a copy of this object, and no such thread."""
        return not self._has_ended and not self._is_fork

    def submit(self, request: OmniRequest, deliver: Deliver, *, stream: bool, steps: bool) -> None:
        """Adds a request; whatever refuses it is delivered as a REJECTED output."""

        def plan_and_send() -> None:
            plan = self._executor.plan(request)
            self._send(
                lambda: self._add(request, plan, deliver, stream, steps),
                lambda error: self._hand_over(deliver, rejected(request.request_id, error)),
            )

        self._in_order(plan_and_send)

    def extend(self, request_id: str, piece: str, is_last: bool, deliver: Deliver) -> Future[None]:
        """As `OmniExecutor.extend`, behind the request itself, which was submitted with `deliver`: its id may be
        another's. Done when the piece was taken, or is not needed any more.
        """
        taken: Future[None] = Future()

        def execute() -> None:
            try:
                if self._is_of(request_id, deliver):
                    self._executor.extend(request_id, piece, is_last)
            finally:
                taken.set_result(None)

        self._in_order(lambda: self._send(execute, lambda error: taken.set_result(None)))
        return taken

    def fail(self, request_id: str, error: OmniError, deliver: Deliver) -> None:
        """As `OmniExecutor.fail`, behind what was asked for before; of the request that `deliver` came with."""

        def execute() -> None:
            if self._is_of(request_id, deliver):
                self._executor.fail(request_id, error)

        self._in_order(lambda: self._send(execute))

    def abort(self, request_id: str, deliver: Deliver | None = None) -> None:
        """Aborts a request; with `deliver`, only the one that was submitted with it."""
        self._in_order(lambda: self._send(lambda: self._abort(request_id, deliver)))

    def set_caller_behind(self, request_id: str, is_behind: bool) -> None:
        """Holds the writers of a stream back, or lets them go on."""
        self._send(lambda: self._executor.set_caller_behind(request_id, is_behind))

    def run(self, function: Callable[[OmniExecutor], T]) -> Future[T]:
        """Calls `function` with the executor between two steps."""
        future: Future[T] = Future()

        def execute() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(self._executor))
                except Exception as error:
                    future.set_exception(error)

        def refuse(error: OmniError) -> None:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

        self._send(execute, refuse)
        return future

    def stop(self, drain: bool) -> None:
        """Ends the thread: once every admitted request is done, or (without `drain`) at once, aborting them."""
        self._in_order(lambda: self._send(lambda: self._stop(drain)))

    def end(self) -> None:
        """As `stop` without `drain`, and ahead of what is being planned."""
        self._send(lambda: self._stop(drain=False))

    @property
    def _is_fork(self) -> bool:
        return os.getpid() != self._process

    def _leave(self) -> None:
        """The interpreter ends, and a thread that computes would crash it."""
        if not self._is_fork:
            self.end()
            self._thread.join(EXIT_S)

    def _in_order(self, function: Callable[[], None]) -> None:
        """Runs behind the requests that are planned at the moment: what was asked for first comes first."""
        if self._is_fork:  # nobody plans here: refuses
            function()
            return
        try:
            self._planning.submit(function)
        except RuntimeError:  # the loop has ended, and refuses
            function()

    def _send(self, execute: Callable[[], None], refuse: Callable[[OmniError], object] = lambda error: None) -> None:
        if self._is_fork:  # whoever held the lock at the fork holds it for ever
            refuse(SchedulerError("AsyncOmni was made before this process was forked off; make a new one here"))
            return
        with self._wake:
            if not self._has_ended:
                self._commands.append(_Command(execute, refuse))
                self._wake.notify()
                self._executor.wake()
                return
        refuse(self._ended_error())

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _main(self) -> None:
        try:
            while self._executor.has_work() or not self._is_stopping:
                self._run_commands()
                if self._has_turn():
                    self._deliver(self._executor.step())
                    self._executor.wait()
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            self.cause_of_death = error
        finally:
            self._end()

    def _has_turn(self) -> bool:
        return self._executor.has_work() or self._executor.is_mending

    def _run_commands(self) -> None:
        with self._wake:
            while not self._commands and not self._has_turn() and not self._is_stopping:
                self._wake.wait(self._executor.rest_s)
        while self._commands:
            command = self._commands.popleft()
            try:
                command.execute()
            except BaseException as error:
                self.cause_of_death = error
                command.refuse(self._ended_error())
                raise

    def _end(self) -> None:
        """Nothing pending may be left without an answer, whatever else goes wrong."""
        with self._wake:
            self._has_ended = True
        self._planning.shutdown(wait=False)
        for command in self._commands:
            command.refuse(self._ended_error())
        for request_id, deliver in self._delivers.items():
            failed = OmniOutput(request_id=request_id, status=RequestStatus.FAILED, error=self._ended_error())
            self._hand_over(deliver, failed)
        try:
            self._executor.shutdown()
        except BaseException as error:
            self.cause_of_death = self.cause_of_death or error
        atexit.unregister(self._leave)  # which waits until all is freed
        self.finished.set_result(None)

    def _add(
        self, request: OmniRequest, plan: RequestPlan | OmniError, deliver: Deliver, stream: bool, steps: bool
    ) -> None:
        try:
            self._executor.add_request(request, plan, stream=stream, steps=steps)
        except OmniError as error:
            self._hand_over(deliver, rejected(request.request_id, error))
        else:
            self._delivers[request.request_id] = deliver

    def _abort(self, request_id: str, deliver: Deliver | None) -> None:
        if deliver is None or self._is_of(request_id, deliver):
            self._executor.abort(request_id)
            self._deliver(self._executor.take_outputs())  # before its id can be another request's

    def _is_of(self, request_id: str, deliver: Deliver) -> bool:
        """Whether the unfinished request of this id was submitted with `deliver`."""
        return self._delivers.get(request_id) == deliver

    def _stop(self, drain: bool) -> None:
        self._is_stopping = True
        if drain:
            self._executor.stop()
        else:
            self._executor.shutdown()

    def _deliver(self, outputs: list[OmniOutput]) -> None:
        for output in outputs:
            deliver = self._delivers.get(output.request_id)
            if output.finished:
                self._delivers.pop(output.request_id, None)
            if deliver is not None and not self._hand_over(deliver, output) and not output.finished:
                self._executor.abort(output.request_id)

    def _hand_over(self, deliver: Deliver, output: OmniOutput) -> bool:
        """False when the receiver is gone (its event loop is closed), or cannot take it."""
        try:
            deliver(output)
        except Exception:
            return False
        return True

    def _ended_error(self) -> SchedulerError:
        if self.cause_of_death is None:
            return SchedulerError("the loop is shut down; make a new AsyncOmni")
        cause = self.cause_of_death
        error = SchedulerError(f"the loop died of {type(cause).__name__}: {cause}; make a new AsyncOmni")
        error.__cause__ = cause
        return error
