"""What goes to a client while nothing happens, and what happens while it reads nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from vllm_omni.entrypoints.server.http.client import begun
from vllm_omni.entrypoints.server.http.event_stream import DONE, KEEP_ALIVE, encode_event, event_stream
from vllm_omni.entrypoints.server.settings import ServerSettings

EVENT = {"a": 1}


class Client:
    """The other end of one answer. reads: whether it takes what is sent, from the second body on."""

    def __init__(self, reads: bool = True) -> None:
        self.bodies: list[bytes] = []
        self._reads = reads

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            if self.bodies and not self._reads:
                await asyncio.Event().wait()
            self.bodies.append(message["body"])

    async def receive(self) -> Any:
        await asyncio.Event().wait()


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
        stream = event_stream(await begun(source.events()), settings)
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
