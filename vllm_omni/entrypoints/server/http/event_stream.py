"""Answers that are written while they are made: bytes, or server-sent events. What happens when nobody listens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vllm_omni.entrypoints.server.http.api_error import ApiError, as_api_error
from vllm_omni.entrypoints.server.http.client import Begun, cancel, until_gone, within
from vllm_omni.entrypoints.server.settings import ServerSettings
from vllm_omni.errors import OmniError

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": still at work\n\n"
NO_BUFFERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # of proxies between us and the client
Event = Mapping[str, Any]  # its `type`, where it has one, becomes the event's name too
T = TypeVar("T")


class PartStream(Response, Generic[T]):
    """Parts as they are made. A client that goes away, or leaves them unread for `write_timeout_s`, closes their
    source, which aborts the request behind it.

    encode: a part's bytes. fail: the bytes that say what went wrong; without it the connection breaks off. last: the
    bytes behind a whole stream. idle: sent when there has been nothing for a while.
    """

    def __init__(
        self,
        source: Begun[T],
        settings: ServerSettings,
        media_type: str,
        encode: Callable[[T], bytes],
        *,
        fail: Callable[[Exception], bytes] | None = None,
        last: bytes = b"",
        idle: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(media_type=media_type, headers={**NO_BUFFERS, **(headers or {})})
        del self.headers["content-length"]
        self._source = source
        self._settings = settings
        self._encode = encode
        self._fail = fail
        self._last = last
        self._idle = idle
        self._is_sending = False
        self._turn_s = 0.0  # of the event loop's clock: when sending last began or ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        leaving = asyncio.ensure_future(until_gone(receive))
        watching = asyncio.ensure_future(self._watch(send))
        try:
            await asyncio.wait({writing, leaving, watching}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        except OSError:
            pass
        finally:
            await cancel(writing, leaving, watching)
            await self._source.aclose()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for part in self._source:
                await self._send_body(send, self._encode(part), more=True)
        except OSError:
            raise
        except Exception as error:
            if self._fail is not None:
                await self._send_body(send, self._fail(error), more=True)
            elif isinstance(error, ApiError | OmniError):
                return  # without an end, which breaks the connection off
            else:
                raise
        await self._send_body(send, self._last, more=False)

    async def _watch(self, send: Send) -> None:
        """Returns when what was sent has not been read for too long; says now and then that there is nothing yet. One
        for the whole stream, as a part must cost little.
        """
        now = asyncio.get_running_loop().time
        self._turn_s = now()
        while True:
            patience_s, pause_s = self._settings.write_timeout_s, self._settings.keep_alive_s
            since_s = now() - self._turn_s
            if self._is_sending and since_s >= patience_s:
                return
            if not self._is_sending and since_s >= pause_s:
                await within(self._send_body(send, self._idle, more=True), patience_s)
                since_s = 0.0
            await asyncio.sleep(patience_s - since_s if self._is_sending else min(patience_s, pause_s - since_s))

    async def _send_body(self, send: Send, body: bytes, more: bool) -> None:
        if body or not more:
            now = asyncio.get_running_loop().time
            self._is_sending, self._turn_s = True, now()
            await send({"type": "http.response.body", "body": body, "more_body": more})
            self._is_sending, self._turn_s = False, now()


def event_stream(source: Begun[Event], settings: ServerSettings) -> PartStream[Event]:
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
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return f"{name}data: {data}\n\n".encode("utf-8", "backslashreplace")
