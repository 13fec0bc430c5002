"""A server that speaks OpenAI's protocol, asked over HTTP: every answer is read while it is made."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any

import aiohttp

from vllm_omni.entrypoints.bench.answer import OK, Answer
from vllm_omni.entrypoints.bench.mix import ROUTES, BenchRequest
from vllm_omni.errors import ConfigError

DATA = b"data:"
DONE = b"[DONE]"
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
        self._timeout = aiohttp.ClientTimeout(sock_connect=timeout_s, sock_read=timeout_s, total=None)
        self._session: aiohttp.ClientSession | None = None  # from entering to leaving: it belongs to an event loop

    async def ask(self, request: BenchRequest, answer: Answer) -> None:
        assert self._session is not None, "outside of `async with`"
        try:
            async with self._session.post(self._root + ROUTES[request.kind], json=self._body(request)) as got:
                if got.status != int(OK):
                    answer.fail(str(got.status), _message(await got.read()))
                elif request.kind == "speech":
                    async for _ in got.content.iter_any():
                        answer.note_sound()
                elif request.kind == "video":
                    await got.read()
                else:
                    await _read_events(got, answer)
        except aiohttp.ServerTimeoutError as error:
            answer.fail("timeout", str(error))
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            answer.fail("connection", str(error))
        except (aiohttp.ClientError, ValueError) as error:
            answer.fail(type(error).__name__, str(error))

    def _body(self, request: BenchRequest) -> dict[str, Any]:
        named = {} if self._model is None else {"model": self._model}
        if request.kind in ("speech", "video"):  # its bytes come as they are
            return {**named, **request.body}
        usage = {"stream_options": {"include_usage": True}} if request.kind in HAVE_USAGE else {}
        return {**named, **request.body, "stream": True, **usage}

    async def __aenter__(self) -> HttpTarget:
        # a load has as many requests under way as it says
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(connector=connector, headers=self._headers, timeout=self._timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()


async def _read_events(response: aiohttp.ClientResponse, answer: Answer) -> None:
    has_content = False
    async for line in _lines(response.content):
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


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Of any length, as a picture is one of them."""
    rest: list[bytes] = []
    async for piece in content.iter_any():
        end, *lines = piece.split(b"\n")
        rest.append(end)
        for line in lines:
            yield b"".join(rest)
            rest = [line]
    yield b"".join(rest)


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
