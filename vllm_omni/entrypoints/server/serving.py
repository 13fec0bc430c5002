"""The process of a server: its socket, its end. Owns the uvicorn server and knows no route."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from vllm_omni.entrypoints.garbage import keep_what_is_there
from vllm_omni.entrypoints.server.app import create_app
from vllm_omni.entrypoints.server.http.protocol import PatientProtocol
from vllm_omni.entrypoints.server.models import ModelTable
from vllm_omni.entrypoints.server.settings import ServerSettings

MAX_WEBSOCKET_BYTES = 16 * 1024**2
# After how long a thread that computes nothing gives way to one that waits. The thread of the models waits whenever a
# kernel has ended and the event loop is at work: with Python's 5 ms that was half of what HTTP cost a language model.
SWITCH_INTERVAL_S = 0.0005


class Server(uvicorn.Server):
    """Ends when told to: the first signal drains, a second one ends at once."""

    def __init__(self, table: ModelTable, settings: ServerSettings) -> None:
        self._settings = settings
        self.failure: Exception | None = None  # why a model could not be loaded
        self._app: FastAPI = create_app(table, settings, self._loaded)
        super().__init__(
            uvicorn.Config(
                self._app,
                host=settings.host,
                port=settings.port,
                http=PatientProtocol,
                ws_max_size=MAX_WEBSOCKET_BYTES,
                limit_concurrency=settings.max_connections,
                timeout_graceful_shutdown=max(1, round(settings.drain_s)),
                timeout_keep_alive=75,
                access_log=False,
                log_level="warning",
                server_header=False,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of SIGTERM and SIGINT."""
        if self.should_exit:
            print("vllm-omni: ending at once", file=sys.stderr, flush=True)
            os._exit(128 + sig)
        self._app.state.parts.runs.is_draining = True
        self.should_exit = True

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started:
            self._limit_unread()
            print(f"vllm-omni: listening on {self.address}", file=sys.stderr, flush=True)

    @property
    def address(self) -> str:
        """http://host:port, the port being the one that was found where 0 was asked for."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def _limit_unread(self) -> None:
        """What we have closed may still hold an answer that its client never reads: the system ends such connections,
        where it can.
        """
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections have it from the socket that they come in at
            milliseconds = round(1000 * self._settings.write_timeout_s)
            for each in self.servers[0].sockets:
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def _loaded(self, error: Exception | None) -> None:
        self.failure = error
        if error is not None:
            self.should_exit = True
            return
        keep_what_is_there()


def serve(table: ModelTable, settings: ServerSettings) -> None:
    """Serves until it is told to end; raises what kept a model from being loaded."""
    server = Server(table, settings)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    asyncio.run(server.serve())
    if server.failure is not None:
        raise server.failure
