"""A model hub on loopback that speaks as much of the Hugging Face API as fetching a repository needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 40


@dataclass
class Hub:
    """What was asked of it: (method, path, bytes sent)."""

    url: str
    asked: list[tuple[str, str, int]] = field(default_factory=list)

    def sent(self, suffix: str) -> int:
        """Bytes of all files whose names end so."""
        return sum(size for _, path, size in self.asked if path.endswith(suffix))

    @property
    def lookups(self) -> int:
        """How often somebody asked what the repository holds."""
        return sum("/revision/" in path for _, path, _ in self.asked)


class _Server(ThreadingHTTPServer):
    def __init__(self, repository: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repository = repository
        self.files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        self.hub = Hub(f"http://127.0.0.1:{self.server_address[1]}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        repository, files = self.server.repository, self.server.files
        path = self.path.partition("?")[0]
        name = path.partition(f"/{repository}/resolve/")[2].partition("/")[2]
        if path.startswith(f"/api/models/{repository}/tree/"):
            self._send(200, json.dumps([_entry(each, file) for each, file in files.items()]).encode())
        elif path.startswith(f"/api/models/{repository}"):
            siblings = [{"rfilename": each} for each in files]
            self._send(200, json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode())
        elif name in files:
            self._send_file(files[name].read_bytes(), self.headers.get("Range"))
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _send_file(self, content: bytes, wanted: str | None) -> None:
        first, _, last = (wanted or "bytes=0-").removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._send(206 if wanted else 200, part, {"ETag": etag, "X-Repo-Commit": COMMIT})

    def _send(self, code: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        has_body = self.command == "GET"
        if has_body:
            self.wfile.write(content)
        self.server.hub.asked.append((self.command, self.path.partition("?")[0], len(content) if has_body else 0))


def _entry(name: str, file: Path) -> dict[str, object]:
    return {"type": "file", "path": name, "size": file.stat().st_size, "oid": COMMIT}


@contextmanager
def serving(repository: str, folder: Path) -> Iterator[Hub]:
    """The folder as a repository, at revision main alone."""
    server = _Server(repository, folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
