"""Answers that are written while they are made: bytes, or server-sent events. What happens when nobody listens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from typing import Any, Generic, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vllm_omni.entrypoints.server.http.api_error import ApiError, as_api_error
from vllm_omni.entrypoints.server.http.client import cancel, until_gone
from vllm_omni.entrypoints.server.settings import ServerSettings
from vllm_omni.errors import OmniError

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": still at work\n\n"
NO_BUFFERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # of proxies between us and the client
TO_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # `json.dumps` makes one for every event
MAX_UNSENT = 16  # parts that are sent together
FIRST_S = 2.0  # how long the first part may take before the answer's headers go out without it
Event = Mapping[str, Any]  # its `type`, where it has one, becomes the event's name too
T = TypeVar("T")


class PartStream(Response, Generic[T]):
    """Parts as they are made. A client that goes away, or leaves them unread for `write_timeout_s`, closes their
    source, which aborts the request behind it. What goes wrong before anything was sent is raised: the answer's status
    can still say so.

    encode: a part's bytes. fail: the bytes that say what went wrong; without it the connection breaks off. last: the
    bytes behind a whole stream. idle: sent when there has been nothing for a while. headers: more of them, asked for
    when the answer begins: with the first part, or after `first_s` without it (None: not without it).
    """

    def __init__(
        self,
        source: AsyncGenerator[T, None],
        settings: ServerSettings,
        media_type: str,
        encode: Callable[[T], bytes],
        *,
        fail: Callable[[Exception], bytes] | None = None,
        last: bytes = b"",
        idle: bytes = b"",
        headers: Callable[[], Mapping[str, str]] | None = None,
        first_s: float | None = FIRST_S,
    ) -> None:
        super().__init__(media_type=media_type, headers=NO_BUFFERS)
        del self.headers["content-length"]
        self._source = source
        self._settings = settings
        self._encode = encode
        self._fail = fail
        self._last = last
        self._idle = idle
        self._more_headers = headers
        self._first_s = first_s
        self._unsent: list[bytes] = []
        self._has_news = asyncio.Event()  # something is unsent, or reading has ended
        self._is_sent = asyncio.Event()
        self._has_begun = False  # the answer's status is sent
        self._is_sending = False
        self._turn_s = asyncio.get_running_loop().time()  # when sending last began or ended
        self._timer: asyncio.TimerHandle | None = None
        self._sign: asyncio.Future[None] | None = None  # of life, being sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reading = asyncio.ensure_future(self._read())
        reading.add_done_callback(lambda _: self._has_news.set())
        writing = asyncio.ensure_future(self._write(send, reading))
        leaving = asyncio.ensure_future(until_gone(receive))
        self._watch(send, leaving)
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        except OSError:
            pass
        finally:
            if self._timer is not None:
                self._timer.cancel()
            await cancel(reading, writing, leaving, *([] if self._sign is None else [self._sign]))
            await self._source.aclose()

    async def _read(self) -> None:
        """Brings parts to `_write`, no more of them than the client reads."""
        try:
            async for part in self._source:
                self._unsent.append(self._encode(part))
                self._has_news.set()
                if self._is_sending or len(self._unsent) >= MAX_UNSENT:
                    self._is_sent.clear()
                    await self._is_sent.wait()
        except Exception as error:
            if self._fail is None or not self._has_begun:
                raise
            self._unsent.append(self._fail(error))
        self._unsent.append(self._last)

    async def _write(self, send: Send, reading: asyncio.Future[None]) -> None:
        """All parts that are there at once: a message costs as much as making a small part."""
        await self._begin(send, reading)
        is_over = False
        while not is_over:
            await self._has_news.wait()
            self._has_news.clear()
            is_over = reading.done()
            is_whole = is_over and reading.exception() is None
            body = b"".join(self._unsent)
            self._unsent.clear()
            await self._send_body(send, body, more=not is_whole)
        with suppress(ApiError, OmniError):  # without an end, which breaks the connection off
            reading.result()

    async def _begin(self, send: Send, reading: asyncio.Future[None]) -> None:
        """Says that it goes well, as soon as there is something to show for it."""
        timer = None
        if self._first_s is not None:
            timer = asyncio.get_running_loop().call_later(self._first_s, self._has_news.set)
        await self._has_news.wait()
        if timer is not None:
            timer.cancel()
        if reading.done():
            reading.result()
        self._has_begun = True
        self.headers.update({} if self._more_headers is None else self._more_headers())
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

    def _watch(self, send: Send, leaving: asyncio.Future[None]) -> None:
        """Gives a client up that has left for too long what was sent, and says now and then that there is nothing yet.
        One timer for the whole stream, as a part must cost little.
        """
        loop = asyncio.get_running_loop()
        patience_s, pause_s = self._settings.write_timeout_s, self._settings.keep_alive_s
        since_s = loop.time() - self._turn_s
        if self._is_sending and since_s >= patience_s:
            leaving.cancel()
            return
        if not self._is_sending and since_s >= pause_s:
            if self._has_begun:
                self._sign = asyncio.ensure_future(self._send_body(send, self._idle, more=True))
            since_s = 0.0
        wait_s = patience_s - since_s if self._is_sending else min(patience_s, pause_s - since_s)
        self._timer = loop.call_later(wait_s, self._watch, send, leaving)

    async def _send_body(self, send: Send, body: bytes, more: bool) -> None:
        if body or not more:
            now = asyncio.get_running_loop().time
            self._is_sending, self._turn_s = True, now()
            await send({"type": "http.response.body", "body": body, "more_body": more})
            self._is_sending, self._turn_s = False, now()
        self._is_sent.set()


def event_stream(source: AsyncGenerator[Event, None], settings: ServerSettings) -> PartStream[Event]:
    """Events as `text/event-stream`, ended by `[DONE]`. What goes wrong becomes an event with `error`."""
    return PartStream(
        source,
        settings,
        "text/event-stream; charset=utf-8",
        encode_event,
        fail=lambda error: encode_event({"type": "error", **as_api_error(error).body}),
        last=DONE,
        idle=KEEP_ALIVE,
    )


def encode_event(event: Event) -> bytes:
    name = f"event: {event['type']}\n" if "type" in event else ""
    return f"{name}data: {TO_JSON.encode(event)}\n\n".encode("utf-8", "backslashreplace")
