"""Inputs over the network: from allowed hosts alone, never from this network, whatever redirects and names say."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from vllm_omni.entrypoints.server.http.api_error import ApiError
from vllm_omni.entrypoints.server.requests import media_fetch
from vllm_omni.entrypoints.server.requests.media_fetch import is_public, read_source
from vllm_omni.entrypoints.server.settings import ServerSettings


class Files(BaseHTTPRequestHandler):
    """A host of media; its paths say what it does."""

    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("location", self.path[4:])
            self.end_headers()
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * 65_536)
            except OSError:
                pass
        elif self.path == "/missing":
            self.send_error(404)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"content of " + self.path.encode())

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()


@pytest.fixture
def loopback_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the tests' host were on the open internet."""
    monkeypatch.setattr(media_fetch, "is_public", lambda address: address == "127.0.0.1")


def settings(*hosts: str) -> ServerSettings:
    return ServerSettings(media_hosts=hosts, max_media_mb=1)


def refused(url: str, *hosts: str) -> str:
    with pytest.raises(ApiError) as caught:
        read_source(url, "image", settings(*hosts))
    assert caught.value.status == 400 and caught.value.param == "image"
    return caught.value.message


@pytest.mark.usefixtures("loopback_is_public")
def test_an_allowed_host_is_read(port: int) -> None:
    host = f"127.0.0.1:{port}"
    assert read_source(f"http://{host}/a.png?x=1", "image", settings(host)) == b"content of /a.png?x=1"
    assert read_source(f"http://{host}/to//b.png", "image", settings(host)) == b"content of /b.png"


@pytest.mark.usefixtures("loopback_is_public")
def test_what_an_allowed_host_does_wrong_is_refused(port: int) -> None:
    host = f"127.0.0.1:{port}"
    assert "more than 1 MB" in refused(f"http://{host}/endless", host)
    assert "status 404" in refused(f"http://{host}/missing", host)
    loop = f"http://{host}/to/" * 5 + f"http://{host}/x"
    assert "redirects" in refused(loop, host)


@pytest.mark.usefixtures("loopback_is_public")
def test_every_redirect_is_checked_as_the_first_address_was(port: int) -> None:
    host = f"127.0.0.1:{port}"
    assert "none of the server's" in refused(f"http://{host}/to/http://elsewhere.example/x", host)
    assert "none of the server's" in refused(f"http://{host}/to/http://127.0.0.1:1/x", host)
    assert "not plain http" in refused(f"http://{host}/to/file:///etc/passwd", host)


def test_an_allowed_name_at_an_address_of_this_network_is_refused(port: int) -> None:
    for host in ("localhost", "127.0.0.1", "[::1]"):
        message = refused(f"http://{host}:{port}/x", f"{host.strip('[]')}:{port}" if "[" not in host else "::1")
        assert "not public" in message or "none of the server's" in message


@pytest.mark.usefixtures("loopback_is_public")
def test_the_address_that_was_checked_is_the_one_that_is_asked(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that means another address at the second look-up."""
    answers = [[(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]]
    real = socket.getaddrinfo

    def resolve(host: Any, *rest: Any, **more: Any) -> Any:
        return (
            (answers.pop() if answers else pytest.fail("looked up twice"))
            if host == "moving.example"
            else real(host, *rest, **more)
        )

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    allowed = f"moving.example:{port}"
    assert read_source(f"http://{allowed}/x", "image", settings(allowed)) == b"content of /x"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),  # 6to4 of 127.0.0.1
    ],
)
def test_addresses_of_this_network_are_not_public(address: str, expected: bool) -> None:
    assert is_public(address) is expected


@pytest.mark.parametrize(
    ("url", "hosts", "expected"),
    [
        ("http://a.example/x", (), "fetches nothing"),
        ("http://b.example/x", ("a.example",), "none of the server's"),
        ("http://a.example:8080/x", ("a.example",), "none of the server's"),
        ("http://evil-a.example/x", ("a.example",), "none of the server's"),
        ("http://a.example.evil.org/x", ("a.example",), "none of the server's"),
        ("http://a.example@evil.org/x", ("a.example",), "not plain http"),
        ("http://[::1/x", ("a.example",), "cannot be read"),
        ("ftp://a.example/x", ("a.example",), "scheme 'ftp'"),
        ("HTTP://evil.org/x", ("a.example",), "none of the server's"),
        ("http://evil.example\\@a.example/x", ("a.example",), ""),
    ],
)
def test_urls_beyond_the_list_are_refused(url: str, hosts: tuple[str, ...], expected: str) -> None:
    assert expected in refused(url, *hosts)


def test_below_a_starred_host_alone() -> None:
    allowed = media_fetch._allows
    assert allowed("*.a.example", "x.a.example", None) and allowed("*.a.example", "y.x.a.example", 443)
    assert not allowed("*.a.example", "a.example", None) and not allowed("*.a.example", "xa.example", None)
