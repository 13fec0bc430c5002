"""Health, requests on their way, timelines, metrics, jobs, and the shape of it all in OpenAPI."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import httpx
import pytest
import soundfile
from openai import OpenAI
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from support.loopback import http
from support.server import ServerProcess, threads_of_the_server

from vllm_omni import DiffusionParams, Omni

LONG = {"model": "tiny-omni", "messages": [{"role": "user", "content": "hello"}], "modalities": ["text"]}
LONG |= {"max_tokens": 500, "ignore_eos": True, "stream": True, "temperature": 0}
CHAT = "/v1/chat/completions"


def samples(server: ServerProcess) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = server.get("/metrics").text
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_ready_tells_every_stage_of_every_model(server: ServerProcess) -> None:
    ready = server.get("/ready").json()
    assert ready["status"] == "ready"
    assert set(ready["models"]["tiny-omni"]["stages"]) >= {"thinker", "image", "sound"}


def test_a_running_request_can_be_watched_and_cancelled(server: ServerProcess) -> None:
    with http.stream("POST", server.address + CHAT, json=LONG, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        (listed,) = server.requests()
        assert listed["status"] == "running" and listed["route"] == CHAT
        found = server.get(f"/v1/requests/{listed['id']}").json()
        assert 0 < found["stages"]["thinker"]["step"] < found["stages"]["thinker"]["num_steps"] == 500
        gone = http.delete(f"{server.address}/v1/requests/{listed['id']}", timeout=30).json()
        assert gone == {"id": listed["id"], "object": "request.cancelled", "cancelled": True}
        rest = "\n".join(lines)
    assert '"code":"request_aborted"' in rest and rest.rstrip().endswith("data: [DONE]")
    ended = server.get(f"/v1/requests/{listed['id']}").json()
    assert ended["status"] == "aborted" and ended["error"]["code"] == "request_aborted"
    again = http.delete(f"{server.address}/v1/requests/{listed['id']}", timeout=30).json()
    assert again["cancelled"] is False
    assert server.get("/v1/requests/nobody").status_code == 404


def test_a_request_is_found_by_the_id_of_its_call_of_its_answer_or_its_own(server: ServerProcess) -> None:
    def open_stream(**headers: str) -> Any:
        return http.stream("POST", server.address + CHAT, json=LONG, headers=headers, timeout=60)

    def find(name: str, rest: str = "") -> httpx.Response:
        return server.get(f"/v1/requests/{name}{rest}")

    mine = "job:mine-1.a_"
    with open_stream(**{"x-request-id": mine}) as first, open_stream(**{"x-request-id": mine}):
        clashes = [find(mine), http.delete(f"{server.address}/v1/requests/{mine}")]
        assert first.headers["x-request-id"] == mine
    for clash in clashes:
        assert clash.status_code == 409 and clash.json()["error"]["code"] == "ambiguous_id"
    ids = clashes[0].json()["error"]["message"].rpartition(": ")[2].split(", ")
    server.wait_until_idle()
    ended = find(mine).json()
    assert len(ids) == 2 and ended["id"] in ids and ended["x_request_id"] == mine
    assert [find(each).json()["id"] for each in ids] == ids and find(mine, "/timeline").status_code == 200

    with open_stream() as made:
        answer = json.loads(next(made.iter_lines()).removeprefix("data: "))["id"]
        gone = http.delete(f"{server.address}/v1/requests/{made.headers['x-request-id']}").json()
    assert find(answer).json()["id"] == find(made.headers["x-request-id"]).json()["id"] == gone["id"]
    for odd in ("%00", "a%20b", "%C3%A4", "%ED%A0%80", "mine", "-", "x" * 3000, gone["id"] + "-7"):
        assert find(odd).status_code == 404 and find(odd).json()["error"]["message"]


def test_a_deadline_ends_a_request_with_504(server: ServerProcess) -> None:
    body = {**LONG, "stream": False}
    for options in ({"json": {**body, "timeout": 0.05}}, {"json": body, "headers": {"timeout": "0.05"}}):
        response = http.post(server.address + CHAT, timeout=60, **options)  # type: ignore[arg-type]
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "deadline_exceeded"
        assert response.headers["x-should-retry"] == "false"
    assert http.post(server.address + CHAT, json=body, headers={"timeout": "soon"}).status_code == 400


def test_a_timeline_is_a_chrome_trace_of_the_stages(server: ServerProcess, client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny-omni", messages=[{"role": "user", "content": "draw a red ball"}]
    )
    trace = server.get(f"/v1/requests/{answer.id.removeprefix('chatcmpl-')}/timeline").json()
    spans = {event["name"]: event for event in trace["traceEvents"] if event["ph"] == "X"}
    assert {"thinker", "image"} <= set(spans)
    thinker, image = spans["thinker"], spans["image"]
    assert 0 <= thinker["ts"] <= thinker["ts"] + thinker["dur"] <= image["ts"] + image["dur"]


def test_metrics_count_requests_tokens_and_steps(server: ServerProcess, client: OpenAI) -> None:
    before = samples(server)
    answer = client.chat.completions.create(
        model="words", messages=[{"role": "user", "content": "count me"}], max_tokens=5, extra_body={"ignore_eos": True}
    )
    client.images.generate(model="tiny-image", prompt="a red circle", extra_body={"num_inference_steps": 4})
    after = samples(server)

    def gained(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return after.get(key, 0.0) - before.get(key, 0.0)

    assert answer.usage is not None
    assert gained("vllm_omni_requests_total", model="words", route=CHAT, status="finished") == 1
    assert gained("vllm_omni_tokens_total", model="words", stage="text", kind="generated") == 5
    prompt = gained("vllm_omni_tokens_total", model="words", stage="text", kind="prompt")
    assert prompt == answer.usage.prompt_tokens
    assert gained("vllm_omni_stage_steps_total", model="tiny-image", stage="image") == 4
    assert gained("vllm_omni_request_seconds_count", model="words", route=CHAT) == 1
    assert after[("vllm_omni_requests_running", (("model", "words"),))] == 0
    assert after[("process_resident_memory_bytes", ())] > 1e8
    names = {name for name, _ in after}
    assert {"vllm_omni_kv_blocks_free", "vllm_omni_edge_bytes", "vllm_omni_prompt_cache_hit_rate"} <= names
    dtypes = [dict(labels) for name, labels in after if name == "vllm_omni_stage_dtype_info"]
    assert {"model", "stage", "dtype", "reason"} == set(dtypes[0])
    assert {each["stage"] for each in dtypes if each["model"] == "words"} == {"text"}
    kernels = [dict(labels) for name, labels in after if name == "vllm_omni_stage_kernels_info"]
    words = next(each for each in kernels if each["model"] == "words")
    assert {"attention", "products", "kernels", "layers", "steps"} == set(words) - {"model", "stage"}
    assert any(each["model"] == "tiny-image" and each["stage"] == "image" for each in kernels)


def test_metrics_and_health_do_not_wait_for_a_step(server: ServerProcess) -> None:
    with http.stream("POST", server.address + CHAT, json=LONG, timeout=60) as response:
        next(response.iter_lines())
        with httpx.Client(base_url=server.address) as kept:
            kept.get("/health")
            took = []
            for path in ("/health", "/metrics") * 10:
                began_s = time.monotonic()
                assert kept.get(path).status_code == 200
                took.append(time.monotonic() - began_s)
    assert sorted(took)[len(took) // 2] < 0.5  # a slow machine, shared by many: that it answers at all is shown
    server.wait_until_idle()


# Jobs


def post_job(server: ServerProcess, **body: Any) -> httpx.Response:
    return http.post(f"{server.base_url}/jobs", json=body, timeout=30)


def wait_for(server: ServerProcess, job_id: str, status: str = "completed") -> dict[str, Any]:
    progress = []
    for _ in range(600):
        job: dict[str, Any] = server.get(f"/v1/jobs/{job_id}").json()
        progress.append(job["progress"])
        if job["status"] in ("completed", "failed"):
            break
        time.sleep(0.02)
    assert job["status"] == status
    assert progress == sorted(progress)
    return job


def test_a_job_is_queued_watched_fetched_and_deleted(server: ServerProcess) -> None:
    response = post_job(server, model="tiny-image", prompt="a red circle", seed=4, n=2, output_format="png")
    assert int(response.headers["openai-poll-after-ms"]) > 0
    job = response.json()
    assert job["object"] == "job" and job["status"] in ("queued", "in_progress", "completed")
    done = wait_for(server, job["id"])
    assert (done["progress"], done["num_files"], done["kind"]) == (100, 2, "image")
    content = server.get(f"/v1/jobs/{job['id']}/content")
    assert content.headers["content-type"] == "image/png"
    with threads_of_the_server(), Omni("tiny_image", progress=False) as omni:
        whole = omni.generate("a red circle", DiffusionParams(seed=4, num_outputs=2))[0].images[0]
    assert Image.open(io.BytesIO(content.content)).tobytes() == whole.tobytes()
    assert server.get(f"/v1/jobs/{job['id']}/content", params={"index": 2}).status_code == 404
    deleted = http.delete(f"{server.base_url}/jobs/{job['id']}").json()
    assert deleted == {"id": job["id"], "object": "job.deleted", "deleted": True}
    assert server.get(f"/v1/jobs/{job['id']}").status_code == 404


def test_a_job_gives_sound_too(server: ServerProcess) -> None:
    job = post_job(server, model="tiny-audio", prompt="C4 then E4", output_format="flac").json()
    wait_for(server, job["id"])
    sound, rate = soundfile.read(io.BytesIO(server.get(f"/v1/jobs/{job['id']}/content").content))
    assert rate == 16_000 and len(sound) == 32_000


def test_jobs_are_listed_in_pages(server: ServerProcess) -> None:
    ids = [post_job(server, model="tiny-image", prompt=f"a red circle {n}").json()["id"] for n in range(3)]
    for job_id in ids:
        wait_for(server, job_id)
    page = server.get("/v1/jobs", params={"limit": 2, "order": "desc"}).json()
    assert [job["id"] for job in page["data"]] == ids[:0:-1] and page["has_more"]
    rest = server.get("/v1/jobs", params={"after": page["last_id"], "limit": 1}).json()
    assert [job["id"] for job in rest["data"]] == ids[:1]
    assert server.get("/v1/jobs", params={"after": "nobody"}).status_code == 400


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "tiny-omni", "prompt": "x"}, 400, "kind"),
        ({"model": "tiny-image", "prompt": "x", "kind": "audio"}, 400, "model"),
        ({"model": "tiny-image", "prompt": "x", "output_format": "wav"}, 400, "output_format"),
        ({"model": "tiny-image", "prompt": "x", "num_inference_steps": 10**6}, 400, "num_inference_steps"),
        ({"model": "words", "prompt": "x"}, 400, "model"),
        ({"model": "tiny-image"}, 400, "prompt"),
    ],
)
def test_a_job_that_cannot_be_is_refused_before_it_is_one(
    server: ServerProcess, body: dict[str, Any], status: int, param: str
) -> None:
    response = post_job(server, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_deleting_a_job_aborts_it(server: ServerProcess) -> None:
    job = post_job(server, model="tiny-image", prompt="a red circle", num_inference_steps=900).json()
    assert server.get(f"/v1/jobs/{job['id']}/content").status_code == 409
    http.delete(f"{server.base_url}/jobs/{job['id']}", timeout=30)
    assert server.wait_until_idle() < 20
