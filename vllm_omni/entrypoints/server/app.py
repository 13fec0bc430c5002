"""The ASGI application: routes, the gate before them, and what every error looks like."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from vllm_omni import __version__
from vllm_omni.entrypoints.server.context import ServerParts
from vllm_omni.entrypoints.server.http.api_error import ApiError, as_api_error
from vllm_omni.entrypoints.server.http.gate import Gate
from vllm_omni.entrypoints.server.http.invalid import invalid_field
from vllm_omni.entrypoints.server.jobs import JobStore
from vllm_omni.entrypoints.server.models import ModelTable
from vllm_omni.entrypoints.server.monitoring.metrics import ServerMetrics
from vllm_omni.entrypoints.server.monitoring.tracing import Tracing
from vllm_omni.entrypoints.server.routes import (
    audio,
    chat,
    completions,
    embeddings,
    images,
    jobs,
    models,
    operations,
    playground,
    realtime,
    speech,
    speech_stream,
    stages,
    videos,
    voices,
)
from vllm_omni.entrypoints.server.runs import RunTable
from vllm_omni.entrypoints.server.settings import ServerSettings
from vllm_omni.errors import OmniError

ROUTERS = (
    models.router,
    chat.router,
    completions.router,
    embeddings.router,
    images.router,
    audio.router,
    speech.router,
    speech_stream.router,
    voices.router,
    realtime.router,
    videos.router,
    jobs.router,
    operations.router,
    stages.router,
)


def create_app(table: ModelTable, settings: ServerSettings, on_loaded: Callable[[Exception | None], None]) -> FastAPI:
    """The application; it loads the models when it starts, and frees them when it ends. on_loaded: called when all are
    loaded, or with what kept one from it.
    """

    runs = RunTable()
    parts = ServerParts(settings, table, runs, ServerMetrics(table, runs), JobStore(settings))
    tracing = None if settings.otel is None else Tracing.to_endpoint(settings.otel)
    if tracing is not None:
        runs.observers.append(tracing.observe)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        loading = asyncio.ensure_future(_load(table, on_loaded))
        yield
        loading.cancel()
        await parts.jobs.close()
        await table.shutdown(drain=False)
        if tracing is not None:
            await asyncio.to_thread(tracing.shutdown)

    app = FastAPI(title="vllm-omni", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.parts = parts
    for router in (*ROUTERS, *([playground.router] if settings.ui else [])):
        app.include_router(router)
    for kind in (ApiError, OmniError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.add_middleware(Gate, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    return app


async def _load(table: ModelTable, on_loaded: Callable[[Exception | None], None]) -> None:
    try:
        await table.load()
    except Exception as error:
        on_loaded(error)
    else:
        on_loaded(None)


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        return invalid_field(error.errors()[0]).response()
    if isinstance(error, HTTPException):
        return _of_framework(error).response()
    return as_api_error(error).response()


def _of_framework(error: HTTPException) -> ApiError:
    words = {404: "there is no such path", 405: "the path does not take this method", 400: "the body cannot be read"}
    return ApiError(error.status_code, words.get(error.status_code, str(error.detail)), code="invalid_request")
