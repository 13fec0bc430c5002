"""How a server begins and ends: as a service manager sees it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.belongings import descendants
from support.loopback import http
from support.server import ServerProcess

from vllm_omni.config.loader import load_config
from vllm_omni.entrypoints.cli import main
from vllm_omni.entrypoints.garbage import look_seldom
from vllm_omni.entrypoints.server.models import ModelTable
from vllm_omni.entrypoints.server.serving import Server
from vllm_omni.entrypoints.server.settings import ServerSettings
from vllm_omni.errors import ConfigError

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {
    "model": "tiny-omni",
    "messages": [{"role": "user", "content": "hello"}],
    "modalities": ["text"],
}


# some seconds, however fast the words are
PICTURES: dict[str, Any] = {"model": "tiny-omni", "prompt": "draw a red ball", "num_inference_steps": 200, "n": 4}


def begin(
    server: ServerProcess, path: str, body: dict[str, Any]
) -> tuple[threading.Thread, list[httpx.Response | Exception]]:
    """A long request in a thread, once it runs."""
    found: list[httpx.Response | Exception] = []

    def ask() -> None:
        try:
            found.append(http.post(server.address + path, json=body, timeout=120))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not server.requests():
        time.sleep(0.02)
    return thread, found


@pytest.mark.parametrize("whom", ["it", "all"])
def test_sigterm_lets_what_runs_end_and_takes_nothing_new(whom: str) -> None:
    """A service manager may signal all processes of a service. One server is begun as users begin it."""
    with ServerProcess(["tiny_omni"], fresh=whom == "it") as server:
        with httpx.Client(base_url=server.address) as kept:  # a connection that stays open
            kept.get("/health")
            thread, found = begin(server, CHAT, {**BODY, "max_tokens": 400, "ignore_eos": True})
            for pid in {server.pid, *(descendants(server.pid) if whom == "all" else ())}:
                os.kill(pid, signal.SIGTERM)
            thread.join(120)
            (response,) = found
            assert isinstance(response, httpx.Response) and response.status_code == 200
            assert response.json()["usage"]["completion_tokens"] == 400
        assert server.wait() == 0


def test_a_second_signal_ends_at_once() -> None:
    with ServerProcess(["tiny_omni"]) as server:
        thread, _ = begin(server, "/v1/images/generations", PICTURES)
        os.kill(server.pid, signal.SIGTERM)
        time.sleep(0.3)
        began_s = time.monotonic()
        os.kill(server.pid, signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM
        assert time.monotonic() - began_s < 5
        thread.join(10)


def test_a_drain_has_an_end() -> None:
    with ServerProcess(["tiny_omni"], ["--drain-s", "1"]) as server:
        thread, _ = begin(server, "/v1/images/generations", PICTURES)
        began_s = time.monotonic()
        os.kill(server.pid, signal.SIGTERM)
        server.wait()
        assert time.monotonic() - began_s < 20
        thread.join(10)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--host", "0.0.0.0"), "without a key"),
        (("--config", "no_such_config"), "no_such_config"),
        (("--config", "tiny_image", "--config", "tiny_image"), "twice"),
        (("--config", "tiny_image", "--config", "tiny_omni", "--set", "limits.max_pixels=1"), "--set"),
        (("--drain-s", "-1"), "--drain-s"),
        (("--api-key-file", "/no/such/file"), "--api-key-file"),
        (("--model", "/no/such/folder"), "/no/such/folder"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_no_server(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--port", "0", *flags]) == 1
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and "listening" not in told


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    from support.ar import make_model_folder

    folder = make_model_folder(tmp_path / "model")
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    command = [sys.executable, "-m", "vllm_omni", "serve", "--port", "0", "--model", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr and "safetensors" in result.stderr


@pytest.mark.parametrize("key", ["short", "with space here", "ünprintable-key"])
def test_keys_are_long_and_plain(key: str) -> None:
    with pytest.raises(ConfigError, match="--api-key-file: got a key"):
        ServerSettings(api_keys=(key,))


def test_keys_are_not_shown() -> None:
    assert "a-secret-key" not in repr(ServerSettings(api_keys=("a-secret-key",)))


@pytest.mark.parametrize(
    ("host", "is_open"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("10.0.0.1", False)]
)
def test_only_loopback_needs_no_key(host: str, is_open: bool) -> None:
    if is_open:
        ServerSettings(host=host)
    else:
        with pytest.raises(ConfigError, match="--no-auth"):
            ServerSettings(host=host)
        ServerSettings(host=host, no_auth=True)


def test_what_is_loaded_is_kept_from_the_collector() -> None:
    """A full collection of it would stop every thread for long, again and again."""
    server = Server(ModelTable({"tiny-image": load_config("tiny_image")}), ServerSettings())
    gc.unfreeze()  # what all tests keep from it
    usual = gc.get_threshold()
    try:
        look_seldom()
        assert gc.get_freeze_count() == 0 and gc.get_threshold()[0] > 10 * usual[0]
        server._loaded(None)
        assert gc.get_freeze_count() > 100_000 and gc.get_threshold() == usual and not server.should_exit
    finally:
        gc.set_threshold(*usual)
        gc.freeze()
