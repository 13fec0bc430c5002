"""A server's stages have a process of their own: it answers what they make, lives on when that dies, and can be told
to do without.
"""

from __future__ import annotations

import base64
import io
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from support.belongings import descendants, resident_bytes
from support.loopback import http
from support.server import ServerProcess, threads_of_the_server

from vllm_omni import DiffusionParams, Omni

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
MIN_BYTES = 40 * 2**20
PICTURE = {"model": "tiny-image", "prompt": "a red circle", "seed": 7, "num_inference_steps": 6}
LONG = {**PICTURE, "num_inference_steps": 300}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(["tiny_image"]) as process:
        yield process
        assert "Traceback" not in process.errors, process.errors


def large_processes(server: ServerProcess) -> list[int]:
    """Those that it has started and that hold models; chat templates are rendered in small ones."""
    return [pid for pid in descendants(server.pid) if resident_bytes(pid) > MIN_BYTES]


def models_pid(server: ServerProcess) -> int:
    """The one process of its stages."""
    (found,) = large_processes(server)
    return found


def gauge(server: ServerProcess, name: str) -> float:
    families = text_string_to_metric_families(server.get("/metrics").text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def ends(server: ServerProcess) -> Counter[str]:
    """How many requests have come to which end."""
    families = text_string_to_metric_families(server.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == "vllm_omni_requests_total"]
    return Counter({sample.labels["status"]: int(sample.value) for sample in samples})


def draw(server: ServerProcess, **body: object) -> httpx.Response:
    return http.post(f"{server.base_url}/images/generations", json=body, timeout=120)


def pixels(answer: httpx.Response) -> bytes:
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))).tobytes()


def test_its_stages_share_one_process_whose_memory_and_time_are_told(server: ServerProcess) -> None:
    before_s = gauge(server, "vllm_omni_stage_processes_cpu_seconds")
    assert draw(server, **PICTURE).status_code == 200
    assert models_pid(server) != server.pid
    assert gauge(server, "vllm_omni_stage_processes_cpu_seconds") > before_s > 0
    assert gauge(server, "vllm_omni_stage_processes_resident_bytes") > 1e8


def test_a_picture_is_the_one_that_omni_draws(server: ServerProcess) -> None:
    with threads_of_the_server(), Omni("tiny_image", progress=False) as omni:
        image = omni.generate("a red circle", DiffusionParams(seed=7, num_inference_steps=6))[0].images[0]
    assert pixels(draw(server, **PICTURE)) == image.tobytes()


def test_a_process_that_dies_is_another_one_and_its_requests_end_as_ever(server: ServerProcess) -> None:
    expected, first = pixels(draw(server, **LONG)), models_pid(server)
    found: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: found.append(draw(server, **LONG)))
    asking.start()
    while not any(run["stages"].get("image", {}).get("step", 0) > 1 for run in server.requests()):
        time.sleep(0.01)
    os.kill(first, signal.SIGKILL)
    statuses = set()
    while asking.is_alive():
        assert server.get("/health").status_code == 200
        statuses.add(server.get("/ready").status_code)
        time.sleep(0.02)
    assert pixels(found[0]) == expected
    assert statuses == {200, 503} and server.get("/ready").status_code == 200
    assert models_pid(server) != first


def test_a_client_that_goes_takes_its_request_along(server: ServerProcess) -> None:
    before = ends(server)
    with pytest.raises(httpx.ReadTimeout):
        http.post(f"{server.base_url}/images/generations", json=LONG, timeout=0.3)
    server.wait_until_idle()
    assert ends(server) - before == {"cancelled": 1}


def test_in_its_own_process_where_that_is_asked_for() -> None:
    with ServerProcess(["tiny_image"], ["--in-process"]) as server:
        assert draw(server, **PICTURE).status_code == 200
        assert not large_processes(server)
        assert gauge(server, "vllm_omni_stage_processes_resident_bytes") == 0
