"""`/v1/audio/voices`: a voice that is added is listed, heard, and gone when it is deleted."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
import yaml
from openai import OpenAI
from support.loopback import http
from support.qwen3_tts import sound
from support.server import ServerProcess
from support.sound_files import read_pcm

SOUND = sound(0.8)
CONSENT = "cons_1234"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("voices")
    voices = {"folder": str(folder / "kept"), "max_voices": 2}
    stages: dict[str, Any] = {"speech": {"kind": "toy_cloner", "device": "cpu", "voices": voices}}
    config = {"name": "cloner", "import": "support.cloning_stages", "stages": stages, "outputs": ["speech"]}
    (folder / "cloner.yaml").write_text(yaml.safe_dump(config))
    del stages["speech"]["voices"]
    (folder / "plain.yaml").write_text(yaml.safe_dump({**config, "name": "plain"}))
    with ServerProcess([f"plain={folder / 'plain.yaml'}", f"cloner={folder / 'cloner.yaml'}"]) as process:
        yield process
        assert "Traceback" not in process.errors, process.errors


def file_of(samples: np.ndarray, rate: int = 24000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def add(server: ServerProcess, sample: bytes | None = None, **fields: str) -> httpx.Response:
    """fields: with "" for one that is left out."""
    data = {"name": "anna", "consent": CONSENT, "model": "cloner", **fields}
    files = {"audio_sample": ("a.wav", file_of(SOUND) if sample is None else sample)}
    sent = {name: value for name, value in data.items() if value}
    return http.post(f"{server.base_url}/audio/voices", files=files, data=sent, timeout=30)


def remove(server: ServerProcess, name: str, **query: str) -> httpx.Response:
    return http.delete(f"{server.base_url}/audio/voices/{name}", params=query)


def say(server: ServerProcess, voice: str) -> np.ndarray:
    client = OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
    spoken = client.audio.speech.create(model="cloner", input="hello", voice=voice, response_format="pcm")
    return read_pcm(spoken.content) / 2**15


def test_an_added_voice_is_listed_heard_and_deleted(server: ServerProcess) -> None:
    made = add(server, ref_text="hello world").json()
    assert (made["id"], made["name"], made["object"]) == ("anna", "anna", "audio.voice")
    assert made["consent"] == CONSENT and made["ref_text"] == "hello world" and made["created_at"] > 1.7e9
    listed = server.get("/v1/audio/voices").json()
    assert listed["voices"] == ["Reader", "anna"] and listed["uploaded_voices"] == [made]
    assert listed["models"] == {"plain": ["Reader"], "cloner": ["Reader", "anna"]}
    np.testing.assert_allclose(say(server, "Anna"), SOUND, atol=2**-14)
    assert np.allclose(say(server, "Reader"), 0.25, atol=2**-14)

    gone = remove(server, "anna")
    assert gone.json() == {"id": "anna", "name": "anna", "object": "audio.voice.deleted", "deleted": True}
    assert server.get("/v1/audio/voices").json()["uploaded_voices"] == []
    assert remove(server, "anna").status_code == 404
    with pytest.raises(Exception, match="voice: got 'anna'"):
        say(server, "anna")


@pytest.mark.parametrize(
    ("field", "sample", "fields"),
    [
        ("consent", None, {"consent": ""}),
        ("consent", None, {"consent": "false"}),
        ("name", None, {"name": "../anna"}),
        ("name", None, {"name": "reader"}),
        ("ref_text", None, {"text": "a", "ref_text": "b"}),
        ("type", None, {"type": "prompt"}),
        ("model", None, {"model": "plain"}),
        ("audio_sample", b"RIFF", {}),
        ("sound", file_of(SOUND[:2400]), {}),
        ("sound", file_of(np.zeros(24000)), {}),
        ("audio_sample", file_of(np.full(24000, np.nan)), {}),
    ],
)
def test_what_is_wrong_with_an_upload_is_said_and_nothing_is_kept(
    server: ServerProcess, field: str, sample: bytes | None, fields: dict[str, str]
) -> None:
    refused = add(server, sample, **fields)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["param"] == field, error
    assert server.get("/v1/audio/voices").json()["uploaded_voices"] == []


def test_the_folder_is_not_filled_beyond_its_limit_and_no_name_is_kept_twice(server: ServerProcess) -> None:
    assert add(server, name="a").status_code == add(server, name="b").status_code == 200
    assert add(server, name="B").json()["error"]["param"] == "name"
    assert "voices.max_voices" in add(server, name="c").json()["error"]["message"]
    assert remove(server, "reader").json()["error"]["message"].endswith("belongs to the checkpoint")
    assert remove(server, "a", model="plain").status_code == 400
    assert remove(server, "a").status_code == remove(server, "b").status_code == 200
