"""HTTP/1.1 with limits on how long a client may take to say what it wants and on how long that is, and an end for who
breaks the protocol.

A head that comes byte by byte would hold a connection for ever; uvicorn's own timer runs between two requests alone. A
request whose body turns out to be none has its answer by that: what the route says of it can no longer be sent.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = 15.0
MAX_HEAD_BYTES = 32_768
INVALID = "Invalid HTTP request received."


class PatientProtocol(HttpToolsProtocol):
    """Closes connections whose request's head is not complete in time or too long, or that go on with what is no HTTP.
    Java's clients offer HTTP/2 with every request (`Upgrade: h2c`): it is answered as if they did not.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _num_head_bytes: int | None = 0  # of the head that is being read; None: the head is complete
    _is_offer = False  # of another protocol than those that are spoken here

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._num_head_bytes is not None:
            self._num_head_bytes += len(data)
            if self._head_timer is None:
                self._expect_head()
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response(INVALID)
        else:
            if self._num_head_bytes is not None and self._num_head_bytes > MAX_HEAD_BYTES:
                self.send_400_response(INVALID)

    def on_headers_complete(self) -> None:
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            raise ValueError("a head that is too long")  # which the parser takes for an error of the client's
        self._num_head_bytes = None
        self._stop_timer()
        self._is_offer = self.parser.should_upgrade() and not self._should_upgrade()
        if not self._is_offer:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self._is_offer:
            self._num_head_bytes = 0
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        has_begun = False
        if self.cycle is not None and not self.cycle.response_complete:
            has_begun = self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if has_begun:
            self.transport.close()
        else:
            super().send_400_response(msg)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._is_offer:
                self._pass_over_offer(data[upgrade.args[0] :])
            else:
                self.handle_websocket_upgrade()

    def _pass_over_offer(self, rest: bytes) -> None:
        """To this parser the rest is the other protocol's; another one reads it, behind a head without the offer."""
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":  # which is one by its name
            raise httptools.HttpParserInvalidMethodError(INVALID)
        named = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self._feed(b"%b %b HTTP/%b\r\n%b\r\n%b" % (method, self.url, version, b"".join(named), rest))

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_S, self._give_up)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
