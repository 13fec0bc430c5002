"""What is refused before a route sees it: keys, sizes, pace, shapes. Raw sockets where a client would not do it."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from support.loopback import http
from support.server import ServerProcess

KEYS = ("first-key-of-two", "second-key-of-two")
SMALL = ["--max-body-mb", "0.01", "--body-timeout-s", "1"]
SMALL += [*("--set", "scheduler.max_queue_size=2"), *("--set", "scheduler.max_running=2")]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with keys and small limits."""
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text("# of the tests\n" + "\n".join(KEYS) + "\n")
    flags = ["--api-key-file", str(file), "--cors-origin", "https://ours.example", "--ui", *SMALL]
    with ServerProcess(["tiny_omni"], flags) as process:
        yield process


def raw(server: ServerProcess, content: bytes, timeout_s: float = 30) -> bytes:
    """All that the server answers to these bytes, until it closes the connection or says nothing more for a while."""
    host, port = server.address.removeprefix("http://").rsplit(":", 1)
    found = b""
    with socket.create_connection((host, int(port)), timeout=timeout_s) as connection:
        with contextlib.suppress(ConnectionError):  # who is refused may be so before all is read
            connection.sendall(content)
        try:
            while chunk := connection.recv(65_536):
                found += chunk
                if b"\r\n\r\n" in found and b"content-length" in found.lower():
                    head, _, body = found.partition(b"\r\n\r\n")
                    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                    if len(body) >= length:
                        break
        except (TimeoutError, ConnectionError):
            pass
    return found


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error, which has OpenAI's four keys."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# Keys


def test_a_wrong_or_missing_key_is_refused_and_a_right_one_taken(strict: ServerProcess) -> None:
    for key in ("wrong-key-altogether", KEYS[0][:-1], KEYS[0] + "x"):
        with pytest.raises(openai.AuthenticationError, match="is wrong"):
            OpenAI(base_url=strict.base_url, api_key=key, max_retries=0).models.list()
    for key in KEYS:
        assert OpenAI(base_url=strict.base_url, api_key=key).models.list().data
        assert strict.get("/v1/models", headers={"x-api-key": key}).status_code == 200
    assert error_of(strict.get("/v1/models"))["code"] == "invalid_api_key"
    assert error_of(strict.get("/metrics"))["type"] == "authentication_error"


def test_health_and_the_page_itself_need_no_key(strict: ServerProcess) -> None:
    assert strict.get("/health").json() == {"status": "ok"}
    assert strict.get("/ready").status_code == 200
    assert "playground" in strict.get("/").text


def test_a_key_alone_restarts_no_stage(strict: ServerProcess) -> None:
    path = f"{strict.base_url}/models/tiny-omni/stages/image/restart"
    assert http.post(path, timeout=30).status_code == 401
    refused = http.post(path, headers={"x-api-key": KEYS[0]}, timeout=30)
    assert refused.status_code == 403 and "--allow-restart" in error_of(refused)["message"]
    assert strict.get("/ready").json()["models"]["tiny-omni"]["stages"]["image"]["num_to_restart"] == 0


def test_keys_are_not_in_what_the_server_writes(strict: ServerProcess) -> None:
    assert not any(key in strict.errors for key in KEYS)


# Bodies


def post(server: ServerProcess, content: Any, **headers: str) -> httpx.Response:
    given = {"authorization": f"Bearer {KEYS[0]}", "content-type": "application/json", **headers}
    return http.post(server.address + CHAT, content=content, headers=given, timeout=30)


def test_a_body_that_is_too_large_is_refused(strict: ServerProcess) -> None:
    response = post(strict, b'{"model": "' + b"x" * 20_000 + b'"}')
    assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    response = post(strict, endless())
    assert response.status_code == 413


def test_a_client_that_keeps_its_body_back_is_let_go(strict: ServerProcess) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEYS[0]}\r\ncontent-type: application/json\r\n"
    began_s = time.monotonic()
    answer = raw(strict, head.encode() + b"content-length: 500\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408") and b"slow_body" in answer
    assert time.monotonic() - began_s < 10


def test_a_lying_content_length_is_refused(strict: ServerProcess) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEYS[0]}\r\ncontent-type: application/json\r\n"
    assert raw(strict, head.encode() + b"content-length: 99999999999999\r\n\r\n{}").startswith(b"HTTP/1.1 413")
    assert raw(strict, head.encode() + b"content-length: -5\r\n\r\n{}").startswith(b"HTTP/1.1 400")
    assert raw(strict, head.encode() + b"content-length: 2\r\n\r\n{}extra bytes").startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("path", ["/health", "/v1/nothing", "/v1/chat/completions"])
@pytest.mark.parametrize("broken", [b"5\r\nhello\r\nno size\r\n", b"2\r\n{}\r\n0\r\n\r\nno request\r\n\r\n"])
def test_who_breaks_the_protocol_in_mid_request_is_refused_in_silence(
    strict: ServerProcess, path: str, broken: bytes
) -> None:
    said = len(strict.errors)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS[0]}\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = raw(strict, head.encode() + broken)
    assert answer.startswith(b"HTTP/1.1 4")
    assert strict.get("/health").status_code == 200
    assert "Traceback" not in strict.errors[said:]


@pytest.mark.parametrize("is_chunked", [False, True])
def test_an_offer_of_http_2_is_passed_over_in_silence(strict: ServerProcess, is_chunked: bool) -> None:
    """As Java's clients make it with every request, bodies included."""
    said = len(strict.errors)
    body = b'{"model": "tiny-omni", "messages": []}'
    head = [
        f"POST {CHAT} HTTP/1.1",
        "Host: x",
        "Connection: Upgrade, HTTP2-Settings",
        "Upgrade: h2c",
        "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
        f"Authorization: Bearer {KEYS[0]}",
        "Content-Type: application/json",
        "Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {len(body)}",
    ]
    sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if is_chunked else body
    answer = raw(strict, "\r\n".join(head).encode() + b"\r\n\r\n" + sent)
    assert answer.startswith(b"HTTP/1.1 400") and b"messages" in answer.partition(b"\r\n\r\n")[2], answer
    assert "upgrade" not in strict.errors[said:].lower()


def test_a_head_that_never_ends_is_refused_once_it_is_too_long(strict: ServerProcess) -> None:
    began_s = time.monotonic()
    assert raw(strict, b"GET /health HTTP/1.1\r\nhost: x\r\nlong: " + b"y" * 100_000).startswith(b"HTTP/1.1 400")
    assert time.monotonic() - began_s < 10


def test_a_wish_for_a_tunnel_is_refused(strict: ServerProcess) -> None:
    assert raw(strict, b"CONNECT there:443 HTTP/1.1\r\nhost: there\r\n\r\nanything").startswith(b"HTTP/1.1 400")


def test_requests_that_come_in_pieces_or_together_are_answered_in_turn(strict: ServerProcess) -> None:
    head = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    last = b"GET /nothing HTTP/1.1\r\nhost: x\r\nx-api-key: " + KEYS[0].encode() + b"\r\nconnection: close\r\n\r\n"
    host, port = strict.address.removeprefix("http://").rsplit(":", 1)
    found = b""
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        for index in range(len(head)):
            connection.sendall(head[index : index + 1])
        connection.sendall(head + head + last)
        while chunk := connection.recv(65_536):
            found += chunk
    assert found.count(b"HTTP/1.1 200") == 3 and found.rindex(b"HTTP/1.1 404") > found.rindex(b"HTTP/1.1 200")


@pytest.mark.parametrize("num_headers", [400, 5_000])
def test_a_flood_of_headers_is_refused(strict: ServerProcess, num_headers: int) -> None:
    many = b"".join(b"x-%d: %s\r\n" % (n, b"y" * 100) for n in range(num_headers))
    flood = b"GET /health HTTP/1.1\r\nhost: x\r\n" + many
    answer = raw(strict, flood + b"\r\n")
    assert not answer or answer.startswith(b"HTTP/1.1 4")
    assert strict.get("/health").status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": "tiny-omni", "messages": [], "temperature": NaN}',
        b'{"model": "tiny-omni", "messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
        b'{"model": "tiny-omni", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"model": "tiny-omni", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "tiny-omni", "messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
        b'{"model": {"a": 1}, "messages": 5}',
        b'{"model": "\\u0000", "messages": [{"role": "user", "content": "x"}]}',
    ],
)
def test_a_body_that_is_no_request_is_one_clear_error(strict: ServerProcess, content: bytes) -> None:
    response = post(strict, content)
    assert response.status_code in (400, 404, 413), response.text
    assert error_of(response)["message"]


def test_another_kind_of_body_is_named(strict: ServerProcess) -> None:
    response = post(strict, b"a=b", **{"content-type": "application/x-www-form-urlencoded"})
    assert (response.status_code, error_of(response)["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nope", 404), ("PUT", CHAT, 405), ("GET", CHAT, 405)])
def test_paths_and_methods_that_are_not_there(strict: ServerProcess, method: str, path: str, status: int) -> None:
    response = http.request(method, strict.address + path, headers={"x-api-key": KEYS[0]}, timeout=30)
    assert response.status_code == status
    assert error_of(response)["message"]


# Ids, browsers, queue


def test_a_request_id_comes_back_or_is_made(strict: ServerProcess) -> None:
    assert strict.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for bad in ("a b", "x" * 200, "<script>"):
        made = strict.get("/health", headers={"x-request-id": bad}).headers["x-request-id"]
        assert made != bad and len(made) == 32


def test_browsers_of_named_sites_alone_may_call(strict: ServerProcess) -> None:
    ours = strict.get("/health", headers={"origin": "https://ours.example"})
    assert ours.headers["access-control-allow-origin"] == "https://ours.example"
    assert (
        "access-control-allow-origin" not in strict.get("/health", headers={"origin": "https://other.example"}).headers
    )


def test_a_full_queue_is_said_at_once_and_a_patient_client_gets_through(strict: ServerProcess) -> None:
    """Two may run and two may wait; the rest of a crowd is told to come back, and does."""

    def ask(client: OpenAI, max_tokens: int) -> Any:
        began_s = time.monotonic()
        try:
            return client.chat.completions.create(
                model="tiny-omni",
                messages=[{"role": "user", "content": "hello"}],
                modalities=["text"],
                max_tokens=max_tokens,
                extra_body={"ignore_eos": True},
            )
        except openai.RateLimitError as error:
            return error, time.monotonic() - began_s

    with ThreadPoolExecutor(12) as crowd:
        impatient = OpenAI(base_url=strict.base_url, api_key=KEYS[0], max_retries=0)
        answers = list(crowd.map(lambda _: ask(impatient, 400), range(12)))
        refused = [answer for answer in answers if isinstance(answer, tuple)]
        served = [answer for answer in answers if not isinstance(answer, tuple)]
        assert len(refused) >= 6 and len(served) >= 2
        assert all(answer.usage.completion_tokens == 400 for answer in served)
        for error, took_s in refused:
            assert error.code == "queue_full" and "retry later" in error.message
            assert int(error.response.headers["retry-after-ms"]) > 0
            assert error.response.headers["x-should-retry"] == "true"
            assert took_s < 10
        patient = OpenAI(base_url=strict.base_url, api_key=KEYS[0], max_retries=20)
        answers = list(crowd.map(lambda _: ask(patient, 4), range(12)))
    assert all(answer.choices[0].finish_reason == "length" for answer in answers)
