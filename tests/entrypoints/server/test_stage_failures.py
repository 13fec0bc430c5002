"""Stages that raise, hang, run out of memory or give rubbish, behind a server: who is told what, and who goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from support.failing_stages import RUBBISH, SECRET, SLEEP_S
from support.loopback import http
from support.programs import TESTS
from support.server import ServerProcess

from vllm_omni.entrypoints.async_omni import GRACE_S

CONFIGS = [str(TESTS / "support" / f"{name}_stages.yaml") for name in ("failing", "stuck")]
WORKER_S = 1.0  # `worker_timeout_s` of both
ENOUGH_S = 5.0  # for what takes no time, on a machine that is shared


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess([*CONFIGS, "tiny_image"], ["--allow-restart"]) as process:
        yield process
        assert "Traceback" not in process.errors, process.errors


@pytest.fixture(autouse=True)
def healthy(server: ServerProcess) -> Iterator[None]:
    """Every test finds the server ready, and leaves nothing running; words are answered again."""
    wait_until_ready(server)
    yield
    wait_until_ready(server)
    assert server.wait_until_idle() < 30
    assert said(ask(server, "ab")) == "abab"
    assert {run["status"] for run in server.requests()} == set()


def ask(server: ServerProcess, prompt: str, model: str = "failing", **more: Any) -> httpx.Response:
    body = {"model": model, "prompt": prompt, **more}
    return http.post(f"{server.base_url}/completions", json=body, timeout=60)


def draw(server: ServerProcess, prompt: str = "ab", model: str = "failing") -> httpx.Response:
    """A picture; of `failing` by way of stages that have nothing to do with `words`."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "modalities": ["image"]}
    if model != "failing":
        return http.post(f"{server.base_url}/images/generations", json={"model": model, "prompt": prompt}, timeout=60)
    return http.post(f"{server.base_url}/chat/completions", json=body, timeout=60)


def said(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def complaint(response: httpx.Response, status: int, code: str) -> str:
    """The message of an error in OpenAI's shape; it leaks nothing."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == code
    assert error["type"] == "server_error"
    assert "/srv" not in error["message"] and "0x7f" not in error["message"] and "Traceback" not in error["message"]
    return str(error["message"])


def stage(server: ServerProcess, name: str = "words", model: str = "failing") -> dict[str, Any]:
    found: dict[str, Any] = server.get("/ready").json()["models"][model]["stages"][name]
    return found


def wait_until_ready(server: ServerProcess, timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while (ready := server.get("/ready")).status_code != 200:
        assert time.monotonic() < deadline_s, ready.text
        time.sleep(0.05)


def wait_until_not_ready(server: ServerProcess, timeout_s: float = 30.0) -> dict[str, Any]:
    deadline_s = time.monotonic() + timeout_s
    while (ready := server.get("/ready")).status_code == 200:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    found: dict[str, Any] = ready.json()
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("do", "words"),
    [
        ("raise", "boom"),
        ("fail", "it had to fail"),
        ("lose", "has not finished this task"),
        ("hang", "no progress for 1.0 s"),
        ("no_memory", "out of memory"),
        ("no_host_memory", "out of memory"),
        ("exit", "SystemExit"),
        ("secret", "weights.bin of <Weights object at 0x...>"),
        *((word, "stage 'words'") for word in RUBBISH if not word.startswith("picture")),
    ],
)
def test_what_a_stage_does_wrong_is_told_in_time_with_its_cause(
    server: ServerProcess, do: str, words: str, stream: bool
) -> None:
    began_s = time.monotonic()
    response = ask(server, f"do={do} x", stream=stream)
    assert time.monotonic() - began_s < WORKER_S + ENOUGH_S
    if response.status_code == 200:  # words had come before
        assert stream and '"type":"error"' in response.text and response.text.endswith("data: [DONE]\n\n")
        assert words in response.text and SECRET not in response.text
    else:
        assert words in complaint(response, 500, "stage_failed")
        assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stage_that_gives_nothing_is_no_empty_answer(server: ServerProcess, stream: bool) -> None:
    response = ask(server, "do=no_output x", stream=stream)
    assert '"the model gave no text"' in response.text and (stream or response.status_code == 500)


@pytest.mark.parametrize("do", ["raise", "lose", "no_memory", "bad_image", "picture_is_nan", "picture_is_flat"])
def test_a_picture_that_fails_fails_alone(server: ServerProcess, do: str) -> None:
    response = http.post(
        f"{server.base_url}/jobs", json={"model": "failing", "kind": "image", "prompt": f"do={do} x"}, timeout=60
    )
    if response.status_code == 200:  # it had begun by the time it failed
        job = response.json()
        while job["status"] in ("queued", "in_progress"):
            job = server.get(f"/v1/jobs/{job['id']}").json()
        assert job["status"] == "failed" and job["error"]["code"] == "stage_failed" and job["num_files"] == 0
        assert "'picture'" in job["error"]["message"]
    else:
        assert "'picture'" in complaint(response, 500, "stage_failed")
    assert draw(server).status_code == 200


def test_a_stage_that_breaks_is_named_and_rebuilt_while_all_others_go_on(server: ServerProcess) -> None:
    """A step that blocks for ever, in a thread."""
    before = stage(server)["num_rebuilds"]
    with ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(ask, server, "do=block x")
        while not server.requests():
            time.sleep(0.01)
        while not stuck.done():  # others do not wait for it
            began_s = time.monotonic()
            assert draw(server).status_code == 200 and draw(server, model="tiny-image").status_code == 200
            assert server.get("/health").status_code == 200 and time.monotonic() - began_s < ENOUGH_S
        assert "no progress for" in complaint(stuck.result(), 500, "stage_failed")
    ready = wait_until_not_ready(server, 2.0)
    assert ready["status"] == "stage 'words' is rebuilding" and ready["models"]["tiny-image"]["status"] == "ready"
    words = ready["models"]["failing"]["stages"]["words"]
    assert words["status"] == "rebuilding" and "no progress for" in words["cause"]
    refused = ask(server, "ab")
    assert "'words' is being rebuilt" in complaint(refused, 503, "stage_rebuilding")
    assert refused.headers["x-should-retry"] == "true" and 1 <= int(refused.headers["retry-after"]) <= 60
    assert 0 < int(refused.headers["retry-after-ms"]) <= 60_000
    assert draw(server).status_code == 200 and server.get("/health").status_code == 200
    wait_until_ready(server)
    assert stage(server)["num_rebuilds"] == before + 1 and said(ask(server, "ab")) == "abab"


def test_openais_client_comes_through_a_rebuild_by_itself(server: ServerProcess) -> None:
    client = OpenAI(base_url=server.base_url, api_key="none", max_retries=8, timeout=60)
    with pytest.raises(openai.InternalServerError, match="SystemExit"):
        client.completions.create(model="failing", prompt="do=exit x")
    wait_until_not_ready(server, 2.0)
    assert client.completions.create(model="failing", prompt="ab").choices[0].text == "abab"


def test_a_deadline_ends_a_request_of_a_stage_that_hangs(server: ServerProcess) -> None:
    began_s = time.monotonic()
    response = ask(server, "do=block x", timeout=0.3)
    assert "0.3 s" in complaint(response, 504, "deadline_exceeded") and time.monotonic() - began_s < ENOUGH_S
    wait_until_not_ready(server)  # nobody waits for the thread, which is replaced all the same


def test_a_loop_that_is_stuck_in_a_step_is_seen_and_nobody_waits_for_it(server: ServerProcess) -> None:
    """Inline, a step that does not end holds its model's loop: only the server's own guard can answer."""
    with ThreadPoolExecutor(3) as pool:
        began_s = time.monotonic()
        asked = [
            pool.submit(ask, server, "do=sleep x", "stuck", timeout=0.5, stream=stream) for stream in (True, False)
        ]
        ready = wait_until_not_ready(server)
        model = ready["models"]["stuck"]
        # the stage has been silent since a moment before its step began
        assert model["status"] == "stage 'words' is stuck" and model["step_s"] > 0.9 * WORKER_S
        behind = pool.submit(ask, server, "ab", "stuck", timeout=0.5)
        assert draw(server).status_code == 200 and draw(server, model="tiny-image").status_code == 200
        assert said(ask(server, "ab")) == "abab"
        for path in ("/health", "/metrics"):
            assert http.get(server.address + path, timeout=ENOUGH_S).status_code == 200
        for response in [each.result() for each in (*asked, behind)]:
            assert "stuck" in response.text and "deadline_exceeded" in response.text
        assert time.monotonic() - began_s < SLEEP_S + GRACE_S + ENOUGH_S
        assert not server.requests()
    wait_until_ready(server)
    assert said(ask(server, "ab", "stuck")) == "abab"


def test_a_restart_loses_no_request_and_is_told_until_it_is_over(server: ServerProcess) -> None:
    path = f"{server.base_url}/models/failing/stages/words/restart"
    before = stage(server)["num_rebuilds"]
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, server, f"w{number}") for number in range(8)]
        answer = http.post(path, timeout=60)
        assert answer.status_code == 202 and answer.json()["stage"] == "words" and answer.json()["num_to_restart"] == 1
        told = wait_until_not_ready(server, 5.0)["status"]
        assert told in {"stage 'words' is draining", "stage 'words' is restarting"}
        asked += [pool.submit(ask, server, f"w{number}") for number in range(8, 12)]
        assert draw(server).status_code == 200, "other stages go on"
        assert stage(server)["num_to_restart"] == 1
        assert [said(each.result()) for each in asked] == [f"w{number}" * 2 for number in range(12)]
    about = stage(server)
    assert (about["status"], about["num_to_restart"], about["num_rebuilds"]) == ("ready", 0, before + 1)


def test_a_restart_is_refused_of_what_is_not_there_and_from_other_sites(server: ServerProcess) -> None:
    before = stage(server)["num_rebuilds"]
    for path in ("models/failing/stages/word", "models/failin/stages/words"):
        answer = http.post(f"{server.base_url}/{path}/restart", timeout=60)
        assert answer.status_code == 404 and "did you mean" in answer.json()["error"]["message"]
    path = f"{server.base_url}/models/failing/stages/words/restart"
    answer = http.post(path, headers={"origin": "http://elsewhere.example"}, timeout=60)
    assert answer.status_code == 403 and "elsewhere.example" in answer.json()["error"]["message"]
    assert stage(server)["num_rebuilds"] == before and stage(server)["num_to_restart"] == 0


def test_one_failing_request_among_a_hundred_fails_alone(server: ServerProcess) -> None:
    def one(number: int) -> httpx.Response:
        if number == 50:
            return ask(server, "do=fail x")
        return (draw(server), ask(server, f"w{number}"), ask(server, f"w{number}", "stuck"))[number % 3]

    with ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(one, range(100)))
    assert [number for number, response in enumerate(responses) if response.status_code != 200] == [50]
    assert "had to fail" in complaint(responses[50], 500, "stage_failed")
    for number, response in enumerate(responses):
        if number % 3 and number != 50:
            assert said(response) == f"w{number}" * 2


def test_a_session_tells_of_a_failure_and_goes_on(server: ServerProcess) -> None:
    client = OpenAI(base_url=server.base_url, api_key="none", timeout=60)
    with client.realtime.connect(model="failing") as connection:
        responses = []
        for words in ("do=fail x", "ab"):
            item: Any = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": words}]}
            connection.response.create(
                response={"conversation": "none", "input": [item], "output_modalities": ["text"]}
            )
            while (event := connection.recv()).type != "response.done":
                assert event.type != "error", event
            responses.append(event.response)
    assert [response.status for response in responses] == ["failed", "completed"]
    assert "had to fail" in str(responses[0].status_details)


def test_a_failing_stage_leaves_no_thread_and_no_descriptor(server: ServerProcess) -> None:
    def counts() -> tuple[int, int]:
        from pathlib import Path

        process = Path(f"/proc/{server.pid}")
        return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))

    for _ in range(2):  # pools are filled
        ask(server, "do=fail x", stream=True)
    before = counts()
    for _ in range(10):
        for do in ("fail", "lose", "text_is_number"):
            ask(server, f"do={do} x", stream=True)
    server.wait_until_idle()
    fds, tasks = counts()
    assert fds <= before[0] + 3 and tasks <= before[1] + 3
