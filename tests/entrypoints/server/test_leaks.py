"""Whatever way a caller goes, nothing of its request stays: neither runs nor descriptors, threads or files."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from fuzz.raw_http import Connection
from fuzz.rest import SHARED
from support.belongings import descendants
from support.loopback import http
from support.server import ServerProcess
from support.toy_engine import text_config
from websockets.sync.client import connect

from vllm_omni import OmniOutput, OmniRequest, RequestStatus
from vllm_omni.entrypoints.server.http.client import Begun
from vllm_omni.entrypoints.server.jobs import JobStore
from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.entrypoints.server.runs import Run, RunTable
from vllm_omni.entrypoints.server.settings import ServerSettings

CHAT = {"model": "tiny-omni", "messages": [{"role": "user", "content": "draw a red ball"}], "ignore_eos": True}
SPEECH = {"model": "tiny-speech", "input": "read out: 1 2 3 4 5 6 7 8 9"}
IMAGE = {"model": "tiny-omni", "prompt": "a red ball", "num_inference_steps": 200, "partial_images": 3, "stream": True}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {**CHAT, "max_tokens": 300, "modalities": ["text"]}),
    "chat stream": ("/v1/chat/completions", {**CHAT, "max_tokens": 300, "modalities": ["text"], "stream": True}),
    "choices": ("/v1/completions", {"model": "tiny-omni", "prompt": ["a", "b"], "max_tokens": 300, "stream": True}),
    "picture": ("/v1/images/generations", IMAGE),
    "sound": ("/v1/audio/generate", {"model": "tiny-omni", "prompt": "C4", "num_inference_steps": 200}),
    "speech": ("/v1/audio/speech", SPEECH),
    "speech events": ("/v1/audio/speech", {**SPEECH, "stream_format": "sse"}),
    "batch": ("/v1/audio/speech/batch", {"model": "tiny-speech", "items": [{"input": "1 2 3"}] * 4}),
}
SENTENCES = [
    {"type": "session.config", "model": "tiny-speech", "split_granularity": "sentence"},
    {"type": "input.text", "text": "read out: 1 2 3. read out: 4 5 6. " * 5},
    {"type": "input.done"},
    {"type": "session.close"},
]
ITEM = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "read out: 1 2 3"}]}
TALK = [
    {"type": "conversation.item.create", "item": ITEM},
    {"type": "response.create"},
    {"type": "response.cancel"},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def server(files: Path) -> Iterator[ServerProcess]:
    flags = ["--write-timeout-s", "1", "--body-timeout-s", "1", "--files", str(files)]
    with ServerProcess(["tiny_omni", "tiny_speech"], flags) as process:
        for path, body in REQUESTS.values():  # pools are filled
            with suppress(httpx.RemoteProtocolError):  # sound that is not ready in time breaks off
                http.post(process.address + path, json={**body, "timeout": 0.5}, timeout=60)
        yield process
        assert "Traceback" not in process.errors, process.errors


@pytest.fixture(autouse=True)
def nothing_stays(server: ServerProcess) -> Iterator[None]:
    server.wait_until_idle()
    before = descriptors(server)
    yield
    server.wait_until_idle()
    deadline_s = time.monotonic() + 20  # a connection that nobody reads from is closed in a while
    while len(left := descriptors(server)) > len(before):
        assert time.monotonic() < deadline_s, sorted(left)
        time.sleep(0.05)


def descriptors(server: ServerProcess) -> list[str]:
    """What they stand for, of the server and of its stages' processes. One that is closed meanwhile is left out, and so
    is memory that these share, which they keep for the next tensors.
    """
    found = []
    for pid in (server.pid, *descendants(server.pid)):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.append(str(entry.readlink()))
    return [name for name in found if not name.startswith(SHARED)]


def post(path: str, body: bytes, kind: str = "application/json", length: int | None = None) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {length or len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("rudely", [False, True])
def test_a_client_may_go_at_any_moment(server: ServerProcess, name: str, rudely: bool) -> None:
    path, body = REQUESTS[name]
    for wait_s in (0.0, 0.003, 0.02, 0.1, 0.3):
        with Connection(httpx.URL(server.address)) as connection:
            connection.send(post(path, json.dumps(body).encode()))
            time.sleep(wait_s)
            connection.leave(rudely=rudely)
    assert server.wait_until_idle() < 20


def test_sound_that_fails_on_its_way_breaks_off(server: ServerProcess) -> None:
    """Its status is out, and bytes cannot say what went wrong: a whole file must look otherwise."""
    body = {**SPEECH, "input": "read out: " + "1 2 3 4 5 6 7 8 9 " * 20, "timeout": 1.5, "response_format": "pcm"}
    with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
        http.post(f"{server.base_url}/audio/speech", json=body, timeout=60)


@pytest.mark.parametrize("ends", ["early", "late"])
def test_an_upload_that_breaks_off_leaves_no_file(server: ServerProcess, ends: str) -> None:
    """Files of a megabyte and more are kept on disk while they come."""
    part = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    content = part + b"p" * 3_000_000
    for _ in range(3):
        with Connection(httpx.URL(server.address)) as connection:
            kind = "multipart/form-data; boundary=x"
            connection.send(post("/v1/images/edits", content, kind, length=len(content) + 100))
            if ends == "late":
                answer = connection.answer()
                assert answer is not None and answer.status == 408
            else:
                time.sleep(0.1)
                connection.leave(rudely=True)
    time.sleep(0.2)
    assert not [name for name in descriptors(server) if "(deleted)" in name]


@pytest.mark.parametrize(
    ("path", "events"), [("/v1/audio/speech/stream", SENTENCES), ("/v1/realtime?model=tiny-speech", TALK)]
)
@pytest.mark.parametrize("politely", [True, False])
def test_a_websocket_may_be_closed_at_any_moment(
    server: ServerProcess, path: str, events: list[dict[str, Any]], politely: bool
) -> None:
    for number in range(len(events) + 1):
        for wait_s in (0.0, 0.05, 0.3):
            with connect(server.address.replace("http", "ws") + path, close_timeout=5) as socket:
                for event in events[:number]:
                    socket.send(json.dumps(event))
                time.sleep(wait_s)
                if not politely:
                    socket.socket.close()
    assert server.wait_until_idle() < 20


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere such a connection stays until its client goes")
def test_a_connection_whose_answer_nobody_reads_is_closed(server: ServerProcess) -> None:
    """Each update is answered with all of the session; more than the buffers between the two can hold."""
    update = {"type": "session.update", "session": {"type": "realtime", "instructions": "x" * 90_000}}
    with Connection(httpx.URL(server.address)) as connection:
        upgrade = b"upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n"
        key = b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        connection.send(b"GET /v1/realtime?model=tiny-speech HTTP/1.1\r\nhost: x\r\n" + upgrade + key)
        frame = frame_of(json.dumps(update).encode())
        while connection.send(frame):  # TimeoutError where it is left open
            assert server.get("/health").status_code == 200


def frame_of(content: bytes) -> bytes:
    """A text frame of a client, of 64 KiB and more, with a mask of zeros."""
    return b"\x81\xff" + len(content).to_bytes(8, "big") + b"\0\0\0\0" + content


def test_jobs_deleted_at_any_moment_leave_no_file(server: ServerProcess, files: Path) -> None:
    body = {"model": "tiny-omni", "kind": "image", "prompt": "a red ball", "n": 4, "num_inference_steps": 2}
    for wait_s in [0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0]:
        job = http.post(f"{server.base_url}/jobs", json=body, timeout=30).json()
        time.sleep(wait_s)
        assert http.delete(f"{server.base_url}/jobs/{job['id']}", timeout=30).json()["deleted"]
    server.wait_until_idle()
    assert not list(files.iterdir()) and not server.get("/v1/jobs").json()["data"]


def test_a_file_that_somebody_else_deleted_is_not_found(server: ServerProcess, files: Path) -> None:
    body = {"model": "tiny-omni", "kind": "image", "prompt": "a red ball", "num_inference_steps": 2}
    job = http.post(f"{server.base_url}/jobs", json=body, timeout=30).json()
    while job["status"] != "completed":
        job = server.get(f"/v1/jobs/{job['id']}").json()
        assert job["status"] != "failed"
    for path in files.iterdir():
        path.unlink()
    content = server.get(f"/v1/jobs/{job['id']}/content")
    assert (content.status_code, content.json()["error"]["code"]) == (404, "file_not_found")
    http.delete(f"{server.base_url}/jobs/{job['id']}", timeout=30)


# The parts alone


async def one_output(request_id: str) -> AsyncGenerator[OmniOutput, None]:
    yield OmniOutput(request_id=request_id, status=RequestStatus.FINISHED)


def test_a_job_deleted_while_it_is_written_leaves_no_file(tmp_path: Path) -> None:
    async def begin_and_delete(wait_s: float) -> None:
        store = JobStore(ServerSettings(files=tmp_path))
        run = Run(OmniRequest(prompt="x"), ServedModel("m", text_config()), "/v1/jobs", wants_parts=True)

        async def encode(output: OmniOutput) -> list[tuple[bytes, str]]:
            return [(b"x" * 20_000_000, "png")] * 4

        job = store.start(run, "image", Begun(one_output(run.id)), encode)
        while not list(tmp_path.iterdir()):
            await asyncio.sleep(0)
        await asyncio.sleep(wait_s)
        await store.delete(job)

    for wait_s in (0.0, 0.005, 0.02):
        asyncio.run(begin_and_delete(wait_s))  # and waits for its threads
        assert not list(tmp_path.iterdir())


def test_a_job_that_cannot_be_written_fails_and_leaves_no_file(tmp_path: Path) -> None:
    async def work() -> str:
        store = JobStore(ServerSettings(files=tmp_path))
        run = Run(OmniRequest(prompt="x"), ServedModel("m", text_config()), "/v1/jobs", wants_parts=True)

        async def encode(output: OmniOutput) -> list[tuple[bytes, str]]:
            return [(b"x", "png"), (b"y", "no/such/folder")]

        job = store.start(run, "image", Begun(one_output(run.id)), encode)
        assert job.task is not None
        await job.task
        assert job.error is not None and str(tmp_path) not in job.error.message
        return job.status

    assert asyncio.run(work()) == "failed" and not list(tmp_path.iterdir())


def test_a_run_ends_also_where_an_observer_fails() -> None:
    async def ask() -> None:
        model, table = ServedModel("m", text_config()), RunTable()
        await model.load()
        table.observers.append(lambda run: 1 / 0)
        run = Run(OmniRequest(prompt="ab"), model, "/x", wants_parts=False)
        with pytest.raises(ZeroDivisionError):
            await table.final(run)
        assert not table.living and table.find(run.id) is run and run.request.prompt == ""
        await model.shutdown(drain=False)

    asyncio.run(ask())
