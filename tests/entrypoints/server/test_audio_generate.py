"""`/v1/audio/generate`: sound and music of words."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from support.ace_step import random_pipeline
from support.loopback import http
from support.server import ServerProcess, threads_of_the_server
from support.sound_files import comment_of, read_file, read_integers, read_pcm

from vllm_omni import Omni
from vllm_omni.entrypoints.loading import open_pipeline
from vllm_omni.entrypoints.server.http.api_error import ApiError
from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.entrypoints.server.requests.abilities import Abilities
from vllm_omni.entrypoints.server.requests.building import graph_keys
from vllm_omni.entrypoints.server.settings import ServerSettings
from vllm_omni.params import DiffusionParams

TUNE = "C4 then E4, square, fast"
ASKED: dict[str, Any] = {"model": "tiny-audio", "prompt": TUNE, "seed": 3, "num_inference_steps": 4}


def post(server: ServerProcess, body: dict[str, Any]) -> httpx.Response:
    return http.post(f"{server.base_url}/audio/generate", json=body, timeout=120)


@pytest.fixture(scope="module")
def tune(server: ServerProcess) -> bytes:
    answer = post(server, ASKED)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "audio/wav" and answer.headers["x-sample-rate"] == "16000"
    return answer.content


def test_the_sound_is_the_one_that_omni_makes(tune: bytes) -> None:
    with threads_of_the_server(), Omni("tiny_audio", progress=False) as omni:
        audio = omni.generate(TUNE, DiffusionParams(seed=3, num_inference_steps=4))[0].audios[0]
    samples, rate = read_file(tune)
    assert rate == audio.sample_rate and samples.shape == audio.samples.shape == (1, 32_000)
    assert np.abs(samples - audio.samples).max() <= 1.01 / 2**15


def test_the_words_of_other_servers_mean_the_same(server: ServerProcess, tune: bytes) -> None:
    body = {"model": "tiny-audio", "input": TUNE, "seed": 3, "num_inference_steps": 4, "audio_length": 2.0}
    samples = read_pcm(post(server, {**body, "response_format": "pcm"}).content)
    assert np.array_equal(samples, read_integers(tune))


def test_the_file_says_how_it_was_made_but_not_the_words(tune: bytes) -> None:
    comment = comment_of(tune)
    assert "Seed: 3" in comment and "Steps: 4" in comment and "C4" not in comment


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("lyrics", {"lyrics": "la la"}),  # of music models; this one reads words about notes
        ("bpm", {"bpm": 90}),
        ("audio", {"audio": "/etc/hostname"}),
        ("n", {"n": 2}),
        ("stream", {"stream": True}),
        ("durations_s", {"durations_s": 2.0}),
        ("duration_s", {"duration_s": 3.0}),
        ("duration_s", {"duration_s": 0}),
        ("audio_length", {"duration_s": 2.0, "audio_length": 1.0}),
        ("input", {"input": "another"}),
        ("prompt", {"prompt": None}),
        ("prompt", {"prompt": 7}),
        ("num_inference_steps", {"num_inference_steps": 1_000_000}),
        ("guidance_scale", {"guidance_scale": -1}),
        ("seed", {"seed": 1.5}),
        ("response_format", {"response_format": "midi"}),
        ("model", {"model": "words"}),
        ("extra_params.request_id", {"extra_params": {"request_id": "mine"}}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(
    server: ServerProcess, field: str, more: dict[str, Any]
) -> None:
    answer = post(server, {**ASKED, **more})
    error = answer.json()["error"]
    assert answer.status_code == 400 and field in f"{error['param']} {error['message']}", answer.text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """A graph that brings sounds along, known from its config alone."""
    folder = tmp_path_factory.mktemp("music")
    random_pipeline(folder)
    return ServedModel("music", open_pipeline("ace_step", model=str(folder)))


def test_its_own_fields_reach_the_prompt(model: ServedModel) -> None:
    given = {"lyrics": "[verse]", "bpm": 90, "keyscale": "F# minor", "timesignature": 4, "vocal_language": "en"}
    assert asyncio.run(graph_keys(model, given, ServerSettings())) == given


def test_sounds_come_as_bytes_never_as_paths(model: ServedModel, tmp_path: Path) -> None:
    secret = tmp_path / "secret.wav"
    secret.write_bytes(b"RIFF")
    got = asyncio.run(graph_keys(model, {"audio": "data:audio/wav;base64,UklGRg=="}, ServerSettings()))
    assert got == {"audio": b"RIFF"}
    for path in (str(secret), f"file://{secret}", "http://127.0.0.1/a.wav", 7, ["a.wav"], {"path": str(secret)}):
        with pytest.raises(ApiError) as caught:
            asyncio.run(graph_keys(model, {"reference_audio": path}, ServerSettings()))
        assert caught.value.status == 400 and caught.value.param == "reference_audio"


def test_every_key_that_holds_media_is_known(model: ServedModel) -> None:
    assert Abilities.of(model.pipeline).media_keys == {"audio", "reference_audio"}
