"""The client of one HTTP request: whether it is still there, and what is made for it meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from vllm_omni.entrypoints.server.http.api_error import client_gone

T = TypeVar("T")
RECANCEL_S = 0.1
REFUSAL_S = 0.5  # within which a request that is wrong is refused, before its job is begun


async def until_gone(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away; then ApiError 499, which nobody reads."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(until_gone(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise client_gone()
    finally:
        await cancel(working, leaving)


async def all_of(works: Sequence[Coroutine[Any, Any, T]]) -> Sequence[T]:
    """All results, or the first error, which cancels the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await cancel(*tasks)


async def begun(parts: AsyncGenerator[T, None]) -> Begun[T]:
    """The parts with the first one made, or begun: what refuses a request at once raises here, while the answer's
    status can still say so.
    """
    found = Begun(parts)
    try:
        await asyncio.wait({found.first}, timeout=REFUSAL_S)
        if found.first.done() and not isinstance(found.first.exception(), StopAsyncIteration):
            found.first.result()
    except BaseException:
        await found.aclose()
        raise
    return found


class Begun(AsyncIterator[T], Generic[T]):
    """Parts of which the first is being made, in a task of its own; the others are made where they are asked for.
    `aclose` ends whatever is behind them, read or not.
    """

    def __init__(self, parts: AsyncGenerator[T, None]) -> None:
        self._parts = parts
        self.first: asyncio.Future[T] = asyncio.ensure_future(anext(parts))
        self._is_first_read = False

    async def __anext__(self) -> T:
        if self._is_first_read:
            return await anext(self._parts)
        if not self.first.done():
            await asyncio.wait({self.first})
        self._is_first_read = True
        return self.first.result()

    async def aclose(self) -> None:
        await cancel(self.first)
        await self._parts.aclose()


async def within(work: Awaitable[T], seconds: float) -> T:
    """The result of `work`; asyncio.TimeoutError, and the work cancelled, after so long.

    `asyncio.wait_for` of Python 3.11 loses a cancellation that comes together with the result.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if task.done():
            return task.result()
    finally:
        await cancel(task)
    raise asyncio.TimeoutError


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancels what still runs, and waits until it has ended; whatever swallows a cancellation gets another."""
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=RECANCEL_S)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # so that nobody complains that it was not looked at
