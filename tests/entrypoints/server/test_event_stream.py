"""What goes to a client while nothing happens, and what happens while it reads nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from vllm_omni.entrypoints.server.http.api_error import ApiError
from vllm_omni.entrypoints.server.http.event_stream import DONE, KEEP_ALIVE, PartStream, encode_event, event_stream
from vllm_omni.entrypoints.server.settings import ServerSettings

EVENT = {"a": 1}


class Client:
    """The other end of one answer. reads: whether it takes what is sent, from the second body on. stays_s: when it
    goes away.
    """

    def __init__(self, reads: bool = True, stays_s: float | None = None) -> None:
        self.bodies: list[bytes] = []
        self.headers: dict[bytes, bytes] | None = None
        self._reads = reads
        self._stays_s = stays_s

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.headers = dict(message["headers"])
        elif message["type"] == "http.response.body":
            assert self.headers is not None
            if self.bodies and not self._reads:
                await asyncio.Event().wait()
            self.bodies.append(message["body"])

    async def receive(self) -> Any:
        await (asyncio.Event().wait() if self._stays_s is None else asyncio.sleep(self._stays_s))
        return {"type": "http.disconnect"}


class Source:
    """Events, the second of them after a while."""

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self.is_closed = False

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        try:
            yield EVENT
            await asyncio.sleep(self._pause_s)
            yield EVENT
        finally:
            self.is_closed = True


def answer(source: Source, client: Client, settings: ServerSettings) -> None:
    async def main() -> None:
        stream = event_stream(source.events(), settings)
        await asyncio.wait_for(stream({}, client.receive, client.send), 20)

    asyncio.run(main())


def test_signs_of_life_stand_between_events_that_are_far_apart() -> None:
    client = Client()
    answer(Source(0.5), client, ServerSettings(keep_alive_s=0.1))
    first, *idle, last = client.bodies
    assert first == encode_event(EVENT) and last == encode_event(EVENT) + DONE
    assert 2 <= len(idle) <= 5 and set(idle) == {KEEP_ALIVE}


def test_events_that_come_soon_have_no_signs_of_life_between_them() -> None:
    client = Client()
    answer(Source(0.01), client, ServerSettings(keep_alive_s=10))
    assert client.bodies == [encode_event(EVENT), encode_event(EVENT) + DONE]


@pytest.mark.parametrize("pause_s", [0.0, 10.0])
def test_a_client_that_reads_neither_events_nor_signs_of_life_is_given_up(pause_s: float) -> None:
    client, source = Client(reads=False), Source(pause_s)
    answer(source, client, ServerSettings(keep_alive_s=0.1, write_timeout_s=0.3))
    assert client.bodies == [encode_event(EVENT)] and source.is_closed


class SlowStart:
    """A source whose first part comes after a while, if it comes."""

    def __init__(self, pause_s: float, error: Exception | None = None) -> None:
        self._pause_s = pause_s
        self._error = error
        self.parts = 0
        self.is_closed = False

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        try:
            await asyncio.sleep(self._pause_s)
            if self._error is not None:
                raise self._error
            self.parts += 1
            yield b"x"
        finally:
            self.is_closed = True

    def answer(self, client: Client, first_s: float | None) -> None:
        async def main() -> None:
            stream = PartStream(
                self.pieces(),
                ServerSettings(keep_alive_s=0.05),
                "audio/wav",
                encode=lambda piece: piece,
                idle=b"idle",
                headers=lambda: {"x-parts": str(self.parts)},
                first_s=first_s,
            )
            await asyncio.wait_for(stream({}, client.receive, client.send), 20)

        asyncio.run(main())


def test_what_fails_before_the_first_part_is_raised_so_that_a_status_can_say_it() -> None:
    client, source = Client(), SlowStart(0.2, ApiError(429, "full"))
    with pytest.raises(ApiError, match="full"):
        source.answer(client, first_s=5.0)
    assert client.headers is None and not client.bodies and source.is_closed


@pytest.mark.parametrize("first_s", [None, 5.0])
def test_headers_wait_for_what_the_first_part_says_and_no_sign_of_life_goes_before_them(first_s: float | None) -> None:
    client = Client()
    SlowStart(0.3).answer(client, first_s)
    assert client.headers is not None and client.headers[b"x-parts"] == b"1"
    assert b"".join(client.bodies) == b"x"


def test_headers_do_not_wait_for_ever() -> None:
    client = Client()
    SlowStart(0.5).answer(client, first_s=0.1)
    assert client.headers is not None and client.headers[b"x-parts"] == b"0"
    assert client.bodies[0] == b"idle" and b"".join(client.bodies).replace(b"idle", b"") == b"x"


def test_what_fails_once_the_answer_has_begun_breaks_it_off() -> None:
    client, source = Client(), SlowStart(0.3, ApiError(500, "broken"))
    source.answer(client, first_s=0.1)
    assert client.headers is not None and set(client.bodies) == {b"idle"} and source.is_closed


def test_a_client_that_leaves_before_the_first_part_ends_its_making() -> None:
    client, source = Client(stays_s=0.1), SlowStart(60.0)
    source.answer(client, first_s=5.0)
    assert client.headers is None and source.is_closed
