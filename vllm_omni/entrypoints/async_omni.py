"""AsyncOmni: the same loop as Omni's in one thread of its own, for asyncio callers."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_omni.config.schema import OmniConfig
from vllm_omni.core.routing.request_state import RequestPosition
from vllm_omni.entrypoints.dropping import end_when_dropped
from vllm_omni.entrypoints.loading import ConfigLike, load_executor, open_pipeline
from vllm_omni.entrypoints.loop_thread import LoopThread
from vllm_omni.entrypoints.prompts import Params, PromptLike, make_request, rejected
from vllm_omni.entrypoints.state_file import read_state, state_path, write_state
from vllm_omni.entrypoints.text_pieces import MAX_AHEAD, async_pieces, broken_text, checked_piece, without_pieces
from vllm_omni.errors import InvalidRequestError, RequestTimeoutError
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.request import OmniOutput, OmniRequest, RequestStatus

MAX_UNREAD = 64  # partial outputs of one request
GRACE_S = 5.0  # how much later than its deadline a request is given up whose loop does not answer


class AsyncOmni:
    """A loaded pipeline of stages; arguments as Omni's, save for `progress`. Constructing blocks until all are loaded.

    Every request ends in exactly one final output; what went wrong stands in its `error`, be it a full queue
    (QueueFullError), a bad prompt, a dead loop, or one that hangs beyond the deadline that the request names. An async
    context manager that drains when it is left in peace.
    """

    def __init__(
        self,
        config: ConfigLike | Pipeline | None = None,
        *,
        model: str | None = None,
        overrides: Sequence[str] = (),
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        pipeline = open_pipeline(config, model=model, overrides=overrides, device=device, dtype=dtype)
        self._config = pipeline.config
        self._executor = load_executor(pipeline)
        self._loop = LoopThread(self._executor)
        self._arrivals: weakref.WeakValueDictionary[asyncio.AbstractEventLoop, _Arrivals] = (
            weakref.WeakValueDictionary()
        )
        end_when_dropped(self, self._loop.end)

    @property
    def config(self) -> OmniConfig:
        return self._config

    @property
    def pipeline(self) -> Pipeline:
        """Its graph and the specs of its stages: what it reads, and what it makes."""
        return self._executor.pipeline

    async def generate(self, prompt: PromptLike, params: Params | None = None) -> OmniOutput:
        """The final output of one prompt. Cancelling the awaiting task aborts the request."""
        request = _make_request(prompt, params)
        if isinstance(request, OmniOutput):
            return request
        with self._subscription(request, stream=False) as subscription:
            return await subscription.next()

    async def stream(
        self, prompt: PromptLike, params: Params | None = None, *, steps: bool = True
    ) -> AsyncGenerator[OmniOutput, None]:
        """Partial outputs as they are made, as `Omni.stream` gives them, then exactly one final output. Leaving early
        (`aclose`, cancelling the task) aborts the request between two steps. steps: also those that tell of a step that
        made nothing to show; `find` says how far a request is without them.
        """
        request = _make_request(prompt, params)
        if isinstance(request, OmniOutput):
            yield request
            return
        with self._subscription(request, stream=True, steps=steps) as subscription:
            while not subscription.is_finished:
                yield await subscription.next()

    def abort(self, request_id: str) -> None:
        """Ends a request ABORTED, between two steps; an unknown or finished one is left alone. From any thread."""
        self._loop.abort(request_id)

    async def save_state(self, request_id: str, path: str | Path) -> None:
        """As `Omni.save_state`, between two steps and while the request goes on; `abort` it then to stop it. Of
        `generate` as of `stream`.
        """
        target = state_path(path)
        request = await asyncio.wrap_future(self._loop.run(lambda executor: executor.save_state(request_id)))
        await asyncio.to_thread(write_state, target, request, self._config.name, self._config.limits)

    async def resume(self, path: str | Path) -> OmniOutput:
        """As `Omni.resume`; `stream(read_state(path))` gives partial outputs too."""
        return await self.generate(await asyncio.to_thread(read_state, path))

    async def restart_stage(self, name: str) -> None:
        """As `Omni.restart_stage`; it goes on by itself, `get_status` says how far it is."""
        await asyncio.wrap_future(self._loop.run(lambda executor: executor.restart_stage(name)))

    async def shutdown(self, drain: bool = True) -> None:
        """Takes no more requests, lets the admitted ones finish (or aborts them without `drain`), frees all stages."""
        self._loop.stop(drain)
        await asyncio.shield(asyncio.wrap_future(self._loop.finished))

    def get_status(self) -> dict[str, Any]:
        """Gauges, at once and from any thread: `alive` (the loop runs), requests that wait and run, tasks by stage."""
        return {**self._executor.get_status(), "alive": self._loop.is_alive}

    def find(self, request_id: str) -> RequestPosition | None:
        """Where an unfinished request is, at once and from any thread; None for one that is not here."""
        return self._executor.find(request_id)

    async def get_metrics(self) -> dict[str, Any]:
        """Counters since loading, read between two steps; SchedulerError after shutdown."""
        return await asyncio.wrap_future(self._loop.run(OmniExecutor.get_metrics))

    def _subscription(self, request: OmniRequest, stream: bool, steps: bool = True) -> _Subscription:
        events = asyncio.get_running_loop()
        arrivals = self._arrivals.get(events) or _Arrivals(events)  # as long as one of its subscriptions lives
        self._arrivals[events] = arrivals
        return _Subscription(self._loop, arrivals, request, stream, steps)

    async def __aenter__(self) -> AsyncOmni:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown(drain=kind is None)


def _make_request(prompt: PromptLike, params: Params | None) -> OmniRequest | OmniOutput:
    request = make_request(prompt, params)
    if isinstance(request, OmniRequest):
        try:
            async_pieces(request)
        except InvalidRequestError as error:
            return rejected(request.request_id, error)
    return request


class _Arrivals:
    """Outputs on their way from the loop's thread into one event loop, which is woken once for all that have come until
    it looks: each wake-up interrupts a step.
    """

    def __init__(self, events: asyncio.AbstractEventLoop) -> None:
        self._events = events
        self._arrived: deque[tuple[_Subscription, OmniOutput]] = deque()
        self._is_woken = False

    def add(self, subscription: _Subscription, output: OmniOutput) -> None:
        """From any thread; RuntimeError when the event loop is closed."""
        if self._events.is_closed():
            raise RuntimeError("the event loop is closed")
        self._arrived.append((subscription, output))
        if not self._is_woken:
            self._is_woken = True  # ahead of the call, which may be answered before it returns
            self._events.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._is_woken = False  # ahead of looking: what comes from now on wakes again
        while self._arrived:
            subscription, output = self._arrived.popleft()
            subscription.put(output)


class _Subscription:
    """One request's outputs, brought from the loop's thread into the event loop; leaving early aborts it. Whoever
    leaves partial outputs unread holds their writers back, so that memory does not grow.
    """

    def __init__(
        self, thread: LoopThread, arrivals: _Arrivals, request: OmniRequest, stream: bool, steps: bool
    ) -> None:
        self._thread = thread
        self._arrivals = arrivals
        self._request = request
        self._stream = stream
        self._steps = steps
        self._queue: asyncio.Queue[OmniOutput] = asyncio.Queue()
        self._patience: asyncio.TimerHandle | None = None
        self._reading: asyncio.Task[None] | None = None  # of a text that comes in pieces
        self._is_behind = False
        self.is_finished = False

    async def next(self) -> OmniOutput:
        output = await self._queue.get()
        self.is_finished = output.finished
        if self._is_behind and self._queue.qsize() <= MAX_UNREAD // 2:
            self._set_behind(False)
        return output

    def put(self, output: OmniOutput) -> None:
        """In the event loop."""
        self._queue.put_nowait(output)
        if not self._is_behind and not output.finished and self._queue.qsize() >= MAX_UNREAD:
            self._set_behind(True)

    def __enter__(self) -> _Subscription:
        if self._request.timeout_s is not None:
            patience_s = self._request.timeout_s + GRACE_S
            self._patience = asyncio.get_running_loop().call_later(patience_s, self._give_up)
        self._thread.submit(without_pieces(self._request), self._deliver, stream=self._stream, steps=self._steps)
        pieces = async_pieces(self._request)
        if pieces is not None:
            self._reading = asyncio.ensure_future(self._read(pieces))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._patience is not None:
            self._patience.cancel()
        if self._reading is not None:
            self._reading.cancel()
        if not self.is_finished:
            self._thread.abort(self._request.request_id, self._deliver)

    async def _read(self, pieces: AsyncIterator[str]) -> None:
        """Hands on the pieces of a text as they come, until nobody needs them any more."""
        request_id, ahead = self._request.request_id, deque[Future[None]]()
        try:
            async for piece in pieces:
                ahead.append(self._thread.extend(request_id, checked_piece(piece), False, self._deliver))
                if len(ahead) > MAX_AHEAD:  # others have their turn, also beside an iterator that never waits
                    await asyncio.wrap_future(ahead.popleft())
            self._thread.extend(request_id, "", True, self._deliver)
        except BaseException as error:  # such as CancelledError of a task that the iterator waited for
            self._thread.fail(request_id, broken_text(error), self._deliver)
            if not isinstance(error, Exception):
                raise
        finally:
            if isinstance(pieces, AsyncGenerator):
                await pieces.aclose()

    def _deliver(self, output: OmniOutput) -> None:
        self._arrivals.add(self, output)

    def _give_up(self) -> None:
        """The loop should have ended the request long ago."""
        error = RequestTimeoutError("the model did not answer within the request's deadline: a stage is stuck")
        self._thread.abort(self._request.request_id, self._deliver)
        self.put(OmniOutput(request_id=self._request.request_id, status=RequestStatus.FAILED, error=error))

    def _set_behind(self, is_behind: bool) -> None:
        self._is_behind = is_behind
        self._thread.set_caller_behind(self._request.request_id, is_behind)
