"""A server that speaks OpenAI's protocol, asked over HTTP: every answer is read while it is made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import httpx

from vllm_omni.entrypoints.bench.answer import OK, Answer
from vllm_omni.entrypoints.bench.mix import ROUTES, BenchRequest
from vllm_omni.errors import ConfigError

DATA = "data:"
DONE = "[DONE]"
HAVE_USAGE = ("chat", "completion")  # kinds whose streams tell their tokens when asked to


class HttpTarget:
    """url: with or without `/v1`. An async context manager that closes its connections."""

    def __init__(self, url: str, model: str | None, api_key: str | None, timeout_s: float) -> None:
        root = url.rstrip("/").removesuffix("/v1")
        if not root.startswith(("http://", "https://")):
            raise ConfigError(f"--url: got {url!r:.200}, expected http://HOST:PORT")
        self._root = root
        self._model = model
        self._headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._timeout_s = timeout_s
        self._tls = httpx.create_ssl_context()
        self._idle: list[httpx.AsyncClient] = []  # each with a connection

    async def ask(self, request: BenchRequest, answer: Answer) -> None:
        with self._client() as client:
            await self._ask(client, request, answer)

    async def _ask(self, client: httpx.AsyncClient, request: BenchRequest, answer: Answer) -> None:
        try:
            async with client.stream("POST", self._root + ROUTES[request.kind], json=self._body(request)) as got:
                if got.status_code != int(OK):
                    answer.fail(str(got.status_code), _message(await got.aread()))
                elif request.kind == "speech":
                    async for piece in got.aiter_raw():
                        if piece:
                            answer.note_sound()
                elif request.kind == "video":
                    await got.aread()
                else:
                    await _read_events(got, answer)
        except httpx.TimeoutException as error:
            answer.fail("timeout", type(error).__name__)
        except (httpx.HTTPError, ValueError) as error:
            answer.fail(type(error).__name__, str(error))

    @contextmanager
    def _client(self) -> Iterator[httpx.AsyncClient]:
        """One for each request under way: a pool of many connections looks at all of them for every request."""
        client = self._idle.pop() if self._idle else self._new_client()
        try:
            yield client
        finally:
            self._idle.append(client)

    def _new_client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(headers=self._headers, timeout=self._timeout_s, verify=self._tls)

    def _body(self, request: BenchRequest) -> dict[str, Any]:
        named = {} if self._model is None else {"model": self._model}
        if request.kind in ("speech", "video"):  # its bytes come as they are
            return {**named, **request.body}
        usage = {"stream_options": {"include_usage": True}} if request.kind in HAVE_USAGE else {}
        return {**named, **request.body, "stream": True, **usage}

    async def __aenter__(self) -> HttpTarget:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._idle:
            await client.aclose()


async def _read_events(response: httpx.Response, answer: Answer) -> None:
    has_content = False
    async for line in response.aiter_lines():
        if not line.startswith(DATA):
            continue
        content = line[len(DATA) :].strip()
        if content == DONE:  # to be read to the end, so that the connection serves the next request
            continue
        event = json.loads(content)
        if event.get("error"):
            answer.fail(*_of_event(event["error"]))
            return
        has_content = True
        _note(event, answer)
    if not has_content:
        answer.fail("empty", "the stream held no event")


def _note(event: Mapping[str, Any], answer: Answer) -> None:
    if str(event.get("type", "")).endswith(".partial_image"):
        answer.note_preview()
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if choice.get("text") or (isinstance(delta.get("content"), str) and delta["content"]):
            answer.note_text()
        if delta.get("preview"):
            answer.note_preview()
        if (delta.get("audio") or {}).get("data"):
            answer.note_sound()
    usage = event.get("usage") or {}
    if "completion_tokens" in usage:
        details = usage.get("completion_tokens_details") or {}
        answer.num_tokens = usage["completion_tokens"] - (details.get("audio_tokens") or 0)


def _of_event(error: Any) -> tuple[str, str]:
    """(what to count it as, what it says): the status is 200 by then."""
    if not isinstance(error, Mapping):
        return "stream", str(error)
    return str(error.get("code") or error.get("type") or "stream"), str(error.get("message", ""))


def _message(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return content[:300].decode(errors="replace")
