"""What every request passes before a route sees it: its id, its key, its size, its pace, its kind of body."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_omni.entrypoints.server.http.api_error import ApiError
from vllm_omni.entrypoints.server.http.client import within
from vllm_omni.entrypoints.server.settings import MIB, ServerSettings
from vllm_omni.request import new_request_id

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/favicon.ico"})  # without a key
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
WEBSOCKET_KEY = "openai-insecure-api-key."  # how browsers send a key with a WebSocket: as a subprotocol


class Gate:
    """ASGI middleware; refuses with the shape of ApiError. `x-request-id` goes out as it came in, or is made."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._keys = tuple(_digest(key.encode()) for key in settings.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        run_id = new_request_id()  # a client may send the same id again, for a retry; ours is unique all the same
        request_id = given if REQUEST_ID.fullmatch(given) else run_id
        scope.setdefault("state", {}).update(request_id=request_id, run_id=run_id)
        sender = _Sender(send, request_id)
        body = _Body(receive, self._settings)
        try:
            self._check_key(scope, headers)
            if scope["type"] == "websocket":
                await self._app(scope, receive, send)
                return
            body.check_headers(headers)
            await self._app(scope, body.receive, sender.send)
        except ApiError as error:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": error.message[:100]})
            elif not sender.has_begun:
                await error.response()(scope, receive, sender.send)
            else:
                raise

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        if not self._keys or (scope["type"] == "http" and scope["path"] in OPEN_PATHS) or _is_preflight(scope):
            return
        given = _given_key(headers)
        digest = _digest(given)
        # all keys are looked at, each in constant time, so that the time says nothing
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        if not any(matches):
            words = "the API key is wrong" if given else "an API key is missing (authorization: Bearer KEY)"
            raise ApiError(401, words, code="invalid_api_key")


class _Body:
    """Counts the bytes of a body as they come, and the seconds between them."""

    def __init__(self, receive: Receive, settings: ServerSettings) -> None:
        self._receive = receive
        self._settings = settings
        self._num_bytes = 0
        self._is_complete = False

    def check_headers(self, headers: Headers) -> None:
        declared = headers.get("content-length")
        if declared is not None and declared.isdigit() and int(declared[:20]) > self._settings.max_body_bytes:
            raise self._too_large()

    async def receive(self) -> Message:
        if self._is_complete:  # what is waited for now is the client going away
            return await self._receive()
        try:
            message = await within(self._receive(), self._settings.body_timeout_s)
        except asyncio.TimeoutError:
            raise ApiError(
                408, f"no more of the body came for {self._settings.body_timeout_s:g} s", code="slow_body"
            ) from None
        self._num_bytes += len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        if self._num_bytes > self._settings.max_body_bytes:
            raise self._too_large()
        return message

    def _too_large(self) -> ApiError:
        limit = self._settings.max_body_bytes / MIB
        return ApiError(413, f"the body is larger than {limit:g} MB (--max-body-mb)", code="body_too_large")


class _Sender:
    """Adds the request's id to the answer's headers."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.has_begun = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._request_id
            headers["x-content-type-options"] = "nosniff"
        await self._send(message)


def _given_key(headers: Headers) -> bytes:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key:
        return key.strip().encode()
    if headers.get("x-api-key"):
        return headers["x-api-key"].encode()
    return _subprotocol_key(headers.get("sec-websocket-protocol", "").split(",")).encode()


def _subprotocol_key(protocols: Sequence[str]) -> str:
    found = [name.strip() for name in protocols if name.strip().startswith(WEBSOCKET_KEY)]
    return found[0].removeprefix(WEBSOCKET_KEY) if found else ""


def _digest(key: bytes) -> bytes:
    """Of equal length for all keys, so that comparing tells no length."""
    return hashlib.sha256(key).digest()


def _is_preflight(scope: Scope) -> bool:
    """A browser's question whether it may ask; it carries no key, and does nothing."""
    return bool(scope["type"] == "http" and scope["method"] == "OPTIONS")
