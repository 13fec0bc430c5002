"""What a route has at hand: the server's parts, and what the HTTP request says besides its body."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends
from starlette.requests import HTTPConnection

from vllm_omni.entrypoints.server.http.api_error import ApiError
from vllm_omni.entrypoints.server.jobs import JobStore
from vllm_omni.entrypoints.server.models import ModelTable, ServedModel
from vllm_omni.entrypoints.server.monitoring.metrics import ServerMetrics
from vllm_omni.entrypoints.server.runs import Run, RunTable
from vllm_omni.entrypoints.server.settings import ServerSettings
from vllm_omni.request import OmniRequest


@dataclass(frozen=True, slots=True)
class ServerParts:
    """One of each for the whole server; `app.state.parts`."""

    settings: ServerSettings
    models: ModelTable
    runs: RunTable
    metrics: ServerMetrics
    jobs: JobStore


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request, or one WebSocket."""

    parts: ServerParts
    connection: HTTPConnection

    @property
    def run_id(self) -> str:
        """The request's id in all that we say of it; the gate has made or checked it."""
        return str(self.connection.scope["state"]["run_id"])

    @property
    def id(self) -> str:
        """`x-request-id` of the answer."""
        return str(self.connection.scope["state"]["request_id"])

    def begin(self, request: OmniRequest, model: ServedModel, *, wants_parts: bool, wants_steps: bool = False) -> Run:
        """A run for this call, to be read by `RunTable.final` or `RunTable.parts`."""
        trace = self.connection.headers.get("traceparent")
        return Run(request, model, self.route, wants_parts, wants_steps, call_id=self.id, traceparent=trace)

    @property
    def route(self) -> str:
        """The path of the route, without what differs from call to call."""
        route = self.connection.scope.get("route")
        return str(getattr(route, "path", self.connection.scope["path"]))

    def timeout_s(self, field: float | None = None) -> float:
        """Seconds to the deadline: the body's field, else the header `timeout`, never more than the server's own."""
        limit_s = self.parts.settings.request_timeout_s
        header = self.connection.headers.get("timeout") or self.connection.headers.get("x-timeout-s")
        if field is None and header is not None:
            try:
                field = float(header)
            except ValueError:
                field = math.nan
            if not field > 0:
                raise ApiError(
                    400, f"timeout: got {header!r:.40}, expected seconds", code="invalid_value", param="timeout"
                )
        return limit_s if field is None else min(field, limit_s)


def call_of(connection: HTTPConnection) -> Call:
    return Call(parts_of(connection), connection)


def parts_of(connection: HTTPConnection) -> ServerParts:
    return cast(ServerParts, connection.app.state.parts)


async def _call_of(connection: HTTPConnection) -> Call:
    """A coroutine: FastAPI would send every request through a thread for a plain function."""
    return call_of(connection)


CallOf = Annotated[Call, Depends(_call_of)]
