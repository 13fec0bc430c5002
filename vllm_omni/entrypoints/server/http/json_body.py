"""Bodies that are JSON, and the routes that take them."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar, get_type_hints

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from vllm_omni.entrypoints.server.context import call_of
from vllm_omni.entrypoints.server.http.api_error import ApiError, client_gone
from vllm_omni.entrypoints.server.schemas.base import Body

B = TypeVar("B", bound=Body)
OTHERS: Mapping[str, Callable[[Request], Any]] = {"call": call_of, "request": lambda request: request}


class JsonRoute(APIRoute):
    """One whose function takes `body`, and besides it `call` and `request` at most, calls it with no more ado: what
    FastAPI does for any signature is a tenth of the event loop's work for a short text, before its model begins. Others
    are FastAPI's own.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint, hints = self.endpoint, get_type_hints(self.endpoint)
        if "body" not in hints or not hints.keys() <= {"body", "return", *OTHERS}:
            return super().get_route_handler()
        others = {name: make for name, make in OTHERS.items() if name in hints}

        async def handle(request: Request) -> Response:
            body = await read_json(request, hints["body"])
            answer = await endpoint(body=body, **{name: make(request) for name, make in others.items()})
            return answer if isinstance(answer, Response) else JSONResponse(answer, self.status_code or 200)

        return handle


async def read_json(request: Request, body_type: type[B]) -> B:
    """ApiError 400 and 415; RequestValidationError for fields."""
    try:
        content = await request.body()
    except ClientDisconnect:
        raise client_gone() from None
    if not is_json(request):
        got = request.headers.get("content-type", "none")
        raise ApiError(415, f"content-type: got {got!r:.80}, expected application/json", code="unsupported_media_type")
    try:
        given = json.loads(content)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is no JSON", code="invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(400, f"body: got {type(given).__name__}, expected an object", code="invalid_value")
    try:
        return body_type.model_validate(given)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def is_json(request: Request) -> bool:
    return "json" in request.headers.get("content-type", "").lower()
