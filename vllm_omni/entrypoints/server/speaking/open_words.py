"""The words of one utterance on their way to a stage that says them as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator


class OpenWords:
    """Written by one task, read by another."""

    def __init__(self, text: str) -> None:
        self.text = text  # so far
        self.is_over = False  # nobody says them any more
        self._queue: asyncio.Queue[str | None] = asyncio.Queue()
        self._queue.put_nowait(text)

    def add(self, text: str) -> None:
        self.text += text
        self._queue.put_nowait(text)

    def end(self) -> None:
        """No more follow."""
        self._queue.put_nowait(None)

    async def pieces(self) -> AsyncGenerator[str, None]:
        while (piece := await self._queue.get()) is not None:
            yield piece
