"""Several streams as one, in the order in which their parts come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

from vllm_omni.entrypoints.server.http.client import cancel

T = TypeVar("T")


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """(number of the stream, part). What one raises ends them all, and so does closing it early."""
    if len(streams) == 1:  # as most are: no task for each part
        async with aclosing(streams[0]) as parts:
            async for part in parts:
                yield 0, part
        return
    waiting = {asyncio.ensure_future(anext(stream)): number for number, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = waiting.pop(task)
                try:
                    part = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(streams[number]))] = number
                yield number, part
    finally:
        await cancel(*waiting)
        for stream in streams:
            await stream.aclose()
