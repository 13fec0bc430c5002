"""`/v1/videos`: asked by OpenAI's client and by plain HTTP, as jobs and at once; files, ranges, refusals, aborts."""

from __future__ import annotations

import base64
import io
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
import yaml
from openai import OpenAI
from playwright.sync_api import sync_playwright
from support.loopback import http
from support.media import image_bytes, picture
from support.server import ServerProcess
from support.tiny_pipelines import save
from support.tiny_videos import SIDE, ltx

from vllm_omni import DiffusionParams, Omni
from vllm_omni.entrypoints.cli import main
from vllm_omni.media.file_info import read_file_info
from vllm_omni.media.video_encoding import encode_video
from vllm_omni.media.video_files import VideoReader

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SMALL: dict[str, Any] = {"num_inference_steps": 2, "num_frames": 9, "size": f"{SIDE}x{SIDE}", "seed": 3}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of OpenAI's client, whose own service is gone


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model that makes videos of words, and one that makes them of a picture."""
    found = {}
    for name, kind in (("films", "LTXPipeline"), ("moves", "LTXImageToVideoPipeline")):
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        save(ltx(kind), folder / "model")
        stage = {"kind": "diffusers", "model": str(folder / "model"), "defaults": {"fps": 12}}
        found[name] = folder / "config.yaml"
        found[name].write_text(yaml.safe_dump({"name": name, "stages": {"video": stage}, "outputs": ["video"]}))
    return found


@pytest.fixture(scope="module")
def videos(configs: dict[str, Path]) -> Iterator[ServerProcess]:
    with ServerProcess([*(f"{name}={path}" for name, path in configs.items()), "tiny_image"], ["--ui"]) as process:
        yield process


@pytest.fixture(scope="module")
def client(videos: ServerProcess) -> OpenAI:
    return OpenAI(base_url=videos.base_url, api_key="none", max_retries=0, timeout=120)


def post(server: ServerProcess, path: str = "", **fields: Any) -> httpx.Response:
    return http.post(f"{server.base_url}/videos{path}", json={"model": "films", **fields}, timeout=60)


def frames(content: bytes) -> np.ndarray:
    with VideoReader(io.BytesIO(content), "film") as reader:
        return np.stack(list(reader.frames(range(reader.header.num_frames))))


def test_openais_client_makes_polls_fetches_and_deletes_a_video(client: OpenAI, configs: dict[str, Path]) -> None:
    made = client.videos.create_and_poll(model="films", prompt="a cat", size=SMALL["size"], extra_body=SMALL)
    assert made.status == "completed" and made.progress == 100 and made.object == "video" and made.error is None
    assert (made.prompt, made.seconds, made.size, made.model) == ("a cat", "0.75", "32x32", "films")
    content = client.videos.download_content(made.id).read()
    with Omni(str(configs["films"]), progress=False) as omni:
        params = DiffusionParams(num_inference_steps=2, num_frames=9, height=SIDE, width=SIDE, seed=3)
        (own,) = omni.generate("a cat", params)
    assert np.array_equal(frames(content), frames(encode_video(own.videos[0], "mp4")))
    assert made.id in [each.id for each in client.videos.list().data]
    assert client.videos.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(made.id)


def test_the_reference_of_openais_client_is_the_first_picture(client: OpenAI) -> None:
    pictures = [image_bytes(picture(SIDE, SIDE, seed)) for seed in (0, 5)]
    contents = []
    for content in pictures:
        made = client.videos.create_and_poll(
            model="moves", prompt="a cat", input_reference=("start.png", content), extra_body=SMALL
        )
        assert made.status == "completed", made.error
        contents.append(frames(client.videos.download_content(made.id).read()))
    assert np.abs(contents[0].astype(int) - contents[1]).mean() > 1


def test_steps_are_told_as_progress(videos: ServerProcess) -> None:
    made = post(videos, prompt="a cat", **{**SMALL, "num_inference_steps": 400})
    assert made.status_code == 200 and made.headers["openai-poll-after-ms"]
    seen, job = [], made.json()
    while job["status"] in ("queued", "in_progress"):
        answer = videos.get(f"/v1/videos/{job['id']}")
        job = answer.json()
        assert answer.headers["openai-poll-after-ms"]
        seen.append(job["progress"])
        time.sleep(0.02)
    assert job["status"] == "completed" and seen == sorted(seen) and seen[-1] == 100
    assert len(set(seen)) > 4, "it does not leap from 0 to 100"


def test_seconds_become_frames_at_the_models_rate_or_the_requests(videos: ServerProcess) -> None:
    sizes = {key: value for key, value in SMALL.items() if key != "num_frames"}
    for fields, seconds in (({"seconds": "2"}, 25 / 12), ({"seconds": 2, "fps": 4}, 9 / 4)):
        answer = post(videos, "/sync", prompt="a cat", **sizes, **fields)
        assert answer.status_code == 200, answer.text
        assert float(answer.headers["x-video-seconds"]) == pytest.approx(seconds, abs=0.01)


def test_sync_gives_the_file_and_what_it_says(videos: ServerProcess, tmp_path: Path) -> None:
    for form, kind in (("mp4", "video/mp4"), ("webm", "video/webm"), ("gif", "image/gif"), ("webp", "image/webp")):
        answer = post(videos, "/sync", prompt="a cat", output_format=form, **SMALL)
        assert answer.status_code == 200 and answer.headers["content-type"] == kind
        assert answer.headers["x-video-size"] == "32x32" and answer.headers["x-request-id"]
        (tmp_path / form).write_bytes(answer.content)
        made = read_file_info(tmp_path / form).metadata
        assert made is not None and made.seed == 3 and made.prompt is None, "words only where the server is told so"
        assert (made.parameters["num_frames"], made.parameters["fps"], made.parameters["size"]) == (9, 12, "32x32")


def test_a_reference_comes_as_a_data_uri_too(videos: ServerProcess) -> None:
    uri = "data:image/png;base64," + base64.b64encode(image_bytes(picture(SIDE, SIDE))).decode()
    wanted = {"model": "moves", "prompt": "a cat", **SMALL}
    answers = [
        post(videos, "/sync", **wanted, input_reference=uri),
        post(videos, "/sync", **wanted, input_reference={"image_url": uri}),
        http.post(
            f"{videos.base_url}/videos/sync",
            data={**{key: str(value) for key, value in wanted.items()}},
            files={"input_reference": ("a.png", image_bytes(picture(SIDE, SIDE)), "image/png")},
            timeout=60,
        ),
    ]
    assert [answer.status_code for answer in answers] == [200] * 3, answers[-1].text
    assert len({answer.content for answer in answers}) == 1


def test_a_part_of_the_file_can_be_asked_for(videos: ServerProcess, client: OpenAI) -> None:
    made = client.videos.create_and_poll(model="films", prompt="a cat", extra_body=SMALL)
    whole = videos.get(f"/v1/videos/{made.id}/content")
    part = http.get(f"{videos.base_url}/videos/{made.id}/content", headers={"range": "bytes=10-29"}, timeout=30)
    assert part.status_code == 206 and part.content == whole.content[10:30]
    assert part.headers["content-range"] == f"bytes 10-29/{len(whole.content)}"
    assert whole.headers["accept-ranges"] == "bytes" and whole.headers["content-type"] == "video/mp4"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_frames": 10_000}, "num_frames: got 10000"),
        ({"num_frames": 500, "size": "2048x2048"}, "num_outputs * num_frames * height * width"),
        ({"seconds": 4}, "seconds: given together with num_frames"),
        ({"fps": 1000}, "fps"),
        ({"size": "huge"}, "size: got 'huge'"),
        ({"output_format": "avi"}, "output_format"),
        ({"input_reference": "data:image/png;base64,AAAA"}, "no stage of this model reads it"),
        ({"input_reference": {"file_id": "x"}}, "input_reference"),
        ({"model": "tiny-image"}, "makes image, not videos"),
        ({"n": 2}, "n"),
        ({"prompt": None}, "prompt"),
    ],
)
def test_what_cannot_be_is_refused_at_once_in_words(videos: ServerProcess, fields: dict[str, Any], words: str) -> None:
    for path in ("", "/sync"):
        answer = post(videos, path, **{"prompt": "a cat", **SMALL, **fields})
        assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text


def test_bodies_of_other_types_are_refused(videos: ServerProcess) -> None:
    address = f"{videos.base_url}/videos"
    for content, kind, status in (
        ("{", "application/json", 400),
        ("[]", "application/json", 400),
        ("x", "text/plain", 415),
    ):
        assert http.post(address, content=content, headers={"content-type": kind}, timeout=30).status_code == status


def test_a_model_of_videos_says_so_and_takes_no_chat(videos: ServerProcess) -> None:
    models = {each["id"]: each for each in videos.get("/v1/models").json()["data"]}
    assert models["films"]["output_modalities"] == ["video"]
    body = {"model": "films", "messages": [{"role": "user", "content": "a cat"}]}
    answer = http.post(f"{videos.base_url}/chat/completions", json=body, timeout=30)
    assert answer.status_code == 400 and "makes video" in answer.json()["error"]["message"]


def test_a_deleted_video_is_aborted_and_pictures_are_no_videos(videos: ServerProcess) -> None:
    job = post(videos, prompt="a cat", **{**SMALL, "num_inference_steps": 1000}).json()
    address = f"{videos.base_url}/videos/{job['id']}"
    assert http.get(f"{address}/content", timeout=30).status_code == 409
    assert http.delete(address, timeout=30).json() == {"id": job["id"], "object": "video.deleted", "deleted": True}
    assert http.get(address, timeout=30).status_code == 404
    other = http.post(
        f"{videos.base_url}/jobs", json={"model": "tiny-image", "prompt": "a red circle"}, timeout=30
    ).json()
    assert videos.get(f"/v1/videos/{other['id']}").status_code == 404
    assert other["id"] not in [each["id"] for each in videos.get("/v1/videos").json()["data"]]
    videos.wait_until_idle()


def test_a_client_that_goes_away_aborts_what_it_waits_for(videos: ServerProcess) -> None:
    body = {"model": "films", "prompt": "a cat", **SMALL, "num_inference_steps": 1000}
    with pytest.raises(httpx.ReadTimeout):
        http.post(f"{videos.base_url}/videos/sync", json=body, timeout=1.0)
    videos.wait_until_idle()


@pytest.mark.parametrize("target", ["serve", "offline"])
def test_bench_loads_videos(
    target: str, videos: ServerProcess, configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = {name: value for name, value in SMALL.items() if name != "seed"}
    mix = {"works": {"films": {"kind": "video", "prompts": ["a cat", "a dog"], "body": body}}}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(mix))
    where = {"serve": ["--url", videos.address, "--model", "films"], "offline": ["--config", str(configs["films"])]}
    arguments = ["bench", target, "--mix", str(tmp_path / "mix.yaml"), "--requests", "4", "--concurrency", "2"]
    assert main([*arguments, *where[target], "-o", str(tmp_path / "load.json")]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "load.json").read_text())["summary"]["num_ok"] == 4


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_playground_shows_a_video_and_how_to_ask_for_it(videos: ServerProcess) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(videos.address)
        page.wait_for_selector("svg .node")
        page.select_option("#model", "films")
        page.get_by_text("Parameters").click()
        for name, value in SMALL.items():
            page.fill(f"input[name={name}]", str(value))
        page.fill("#prompt", "a cat")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#timeline svg, #error:not(:empty)", timeout=60_000)
        assert page.text_content("#error") == "" and not faults
        size = page.eval_on_selector("#film", "async film => (await (await fetch(film.src)).blob()).size")
        assert size == len(post(videos, "/sync", prompt="a cat", **SMALL).content)
        assert "/v1/videos/sync" in str(page.text_content("#code"))
        browser.close()
