"""`/v1/audio/speech`, its batches and its voices, with OpenAI's own client, httpx and curl."""

from __future__ import annotations

import base64
import json
import subprocess
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI
from support.loopback import http
from support.server import ServerProcess
from support.sound_files import read_file, read_integers, read_pcm

WORDS = "3 7 red"
SPEECH: dict[str, Any] = {"model": "tiny-speech", "input": WORDS, "voice": "Reader", "seed": 1}
LONG = {**SPEECH, "input": "one two three four five", "response_format": "pcm"}


@pytest.fixture(scope="module")
def spoken(server: ServerProcess) -> bytes:
    """WORDS as samples."""
    answer = post(server, {**SPEECH, "response_format": "pcm"})
    assert answer.headers["x-sample-rate"] == "24000" and answer.headers["x-channels"] == "1"
    assert answer.headers["x-bit-depth"] == "16" and answer.headers["content-type"] == "audio/pcm"
    return answer.content


def post(server: ServerProcess, body: dict[str, Any], path: str = "/audio/speech") -> httpx.Response:
    answer = http.post(server.base_url + path, json=body, timeout=120)
    answer.raise_for_status()
    return answer


def events_of(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_the_very_words_are_read_out_and_the_stream_is_the_whole_sound(client: OpenAI, spoken: bytes) -> None:
    """A chat in the words of the config's prompts.speech replies with the input's own words, in the same sound."""
    answer = client.chat.completions.create(
        model="tiny-speech",
        messages=[{"role": "user", "content": f"can you read out: {WORDS}?"}],
        modalities=["text", "audio"],
        audio={"voice": "Reader", "format": "pcm16"},
        seed=1,
    )
    message = answer.choices[0].message
    assert message.content == "three seven red"
    assert message.audio is not None and base64.b64decode(message.audio.data) == spoken


def test_openais_client_gets_an_mp3_when_it_does_not_say(client: OpenAI, spoken: bytes) -> None:
    with client.audio.speech.with_streaming_response.create(model="tiny-speech", input=WORDS, voice="alloy") as answer:
        assert answer.headers["content-type"] == "audio/mpeg" and answer.headers["transfer-encoding"] == "chunked"
        content = b"".join(answer.iter_bytes())
    samples, rate = read_file(content)
    assert rate == 24_000 and abs(samples.shape[1] - len(spoken) / 2) < 5_000


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_every_lossless_format_holds_the_same_samples(client: OpenAI, spoken: bytes, kind: Any) -> None:
    answer = client.audio.speech.create(
        model="tiny-speech", input=WORDS, voice="Reader", response_format=kind, extra_body={"seed": 1}
    )
    got = read_integers(answer.read())
    bound = 1 if kind == "flac" else 0  # its 24 bits are rounded again here
    assert len(got) == len(spoken) // 2 and np.abs(got.astype(int) - read_pcm(spoken)).max() <= bound


@pytest.mark.parametrize("kind", ["opus", "aac"])
def test_compressed_formats_sound_the_same(server: ServerProcess, spoken: bytes, kind: str) -> None:
    answer = post(server, {**SPEECH, "response_format": kind})
    assert "x-sample-rate" not in answer.headers  # the file says it, and may have another one
    samples, rate = read_file(answer.content)
    expected = read_pcm(spoken) / 2**15
    got = np.interp(np.arange(len(expected)) / 24_000, np.arange(samples.shape[1]) / rate, samples[0])
    shifted = max(
        abs(np.corrcoef(expected[4000:-4000], np.roll(got, k)[4000:-4000])[0, 1]) for k in range(-2500, 500, 2)
    )
    assert shifted > 0.9


def test_the_first_bytes_are_sent_while_it_still_speaks(server: ServerProcess) -> None:
    with http.stream("POST", f"{server.base_url}/audio/speech", json=LONG, timeout=120) as answer:
        pieces = answer.iter_raw()
        assert next(pieces)
        assert [run["route"] for run in server.requests()] == ["/v1/audio/speech"]
        assert sum(map(len, pieces)) > 24_000


@pytest.mark.parametrize("asked", [{"stream_format": "sse"}, {"stream": True}])
def test_events_hold_the_same_bytes_and_end_with_usage(
    server: ServerProcess, spoken: bytes, asked: dict[str, Any]
) -> None:
    answer = post(server, {**SPEECH, "response_format": "pcm", **asked})
    *deltas, done = events_of(answer.text)
    assert {event["type"] for event in deltas} == {"speech.audio.delta"} and len(deltas) > 1
    assert b"".join(base64.b64decode(event["audio"]) for event in deltas) == spoken
    usage = done["usage"]
    assert done["type"] == "speech.audio.done" and usage["input_tokens"] > 0 and usage["output_tokens"] > 0
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


@pytest.mark.parametrize("speed", [0.5, 2.0])
def test_speed_changes_how_long_it_takes(server: ServerProcess, spoken: bytes, speed: float) -> None:
    answer = post(server, {**SPEECH, "response_format": "pcm", "speed": speed})
    assert len(answer.content) * speed == pytest.approx(len(spoken), rel=0.05)


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("voice", {"voice": "nobody"}),
        ("voice", {"voice": {"id": "nobody"}}),
        ("speaker", {"speaker": "nobody"}),
        ("instructions", {"instructions": "whisper"}),
        ("ref_audio", {"ref_audio": "/etc/hostname"}),
        ("task_type", {"task_type": "Base"}),
        ("word_timestamps", {"word_timestamps": True}),
        ("request_id", {"request_id": "mine"}),
        ("speed", {"speed": 5}),
        ("speed", {"speed": 0.2}),
        ("response_format", {"response_format": "ogg"}),
        ("stream_format", {"stream_format": "websocket"}),
        ("seed", {"seed": -1}),
        ("input", {"input": ""}),
        ("input", {"input": " \n"}),
        ("input", {"input": 7}),
        ("model", {"model": "words"}),
        ("voice", {"model": "tiny-audio", "voice": "Reader"}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(client: OpenAI, field: str, body: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.speech.create(**{"model": "tiny-speech", "input": WORDS, "voice": "Reader"}, extra_body=body)
    error: Any = caught.value
    assert field in str(error.param or "") or (field == "speaker" and error.param == "voice"), error


def test_null_and_neutral_values_ask_for_nothing(server: ServerProcess, spoken: bytes) -> None:
    neutral = {"instructions": "", "ref_audio": None, "non_streaming_mode": False, "word_timestamps": False}
    body = {**SPEECH, **neutral, "response_format": "pcm", "voice": {"id": "reader"}, "speed": 1}
    assert post(server, body).content == spoken


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.audio.speech.create(model="nobody", input=WORDS, voice="Reader")


def test_a_listener_who_goes_aborts_the_run(server: ServerProcess) -> None:
    with http.stream("POST", f"{server.base_url}/audio/speech", json=LONG, timeout=120) as answer:
        pieces = answer.iter_raw()
        next(pieces)
        (run,) = server.requests()
    server.wait_until_idle(10)
    assert server.get(f"/v1/requests/{run['id']}").json()["status"] != "finished"


def test_an_error_in_the_middle_breaks_the_bytes_off(server: ServerProcess) -> None:
    with (
        pytest.raises(httpx.RemoteProtocolError),
        http.stream("POST", f"{server.base_url}/audio/speech", json=LONG, timeout=120) as answer,
    ):
        pieces = answer.iter_raw()
        next(pieces)
        http.delete(f"{server.base_url}/requests/{server.requests()[0]['id']}")
        list(pieces)
    server.wait_until_idle()


def test_an_error_in_the_middle_is_an_event(server: ServerProcess) -> None:
    body = {**LONG, "stream_format": "sse"}
    with http.stream("POST", f"{server.base_url}/audio/speech", json=body, timeout=120) as answer:
        pieces = answer.iter_text()
        text = next(pieces)
        http.delete(f"{server.base_url}/requests/{server.requests()[0]['id']}")
        text += "".join(pieces)
    last = events_of(text)[-1]
    assert last["type"] == "error" and last["error"]["code"] == "request_aborted"


def test_curl_gets_a_file_that_plays(server: ServerProcess, spoken: bytes) -> None:
    body = json.dumps({**SPEECH, "response_format": "wav"})
    command = ["curl", "-sSfN", f"{server.base_url}/audio/speech", "-H", "content-type: application/json", "-d", body]
    content = subprocess.run(command, check=True, capture_output=True, timeout=120).stdout
    assert np.array_equal(read_integers(content), read_pcm(spoken))


def test_a_batch_answers_each_item_by_itself(server: ServerProcess, spoken: bytes) -> None:
    items = [{"input": WORDS}, {"input": "red", "voice": "nobody"}, {"input": " "}, {"input": WORDS, "seed": 2}]
    items.append({"input": WORDS, "response_format": "wav"})
    shared = {"model": "tiny-speech", "voice": "Reader", "seed": 1, "response_format": "pcm"}
    answer = post(server, {**shared, "items": items}, "/audio/speech/batch").json()
    first, unknown, silent, other, whole = answer["results"]
    assert [result["index"] for result in answer["results"]] == [0, 1, 2, 3, 4]
    assert base64.b64decode(first["audio_data"]) == spoken and first["media_type"] == "audio/pcm"
    assert first["usage"]["total_tokens"] > 0 and first["error"] is None
    assert (unknown["status"], unknown["error"]["param"], unknown["audio_data"]) == ("error", "voice", None)
    assert (silent["status"], silent["error"]["param"]) == ("error", "input")
    assert base64.b64decode(other["audio_data"]) != spoken
    assert np.array_equal(read_integers(base64.b64decode(whole["audio_data"])), read_pcm(spoken))
    assert (answer["total"], answer["succeeded"], answer["failed"]) == (5, 3, 2)


@pytest.mark.parametrize("items", [[], [{"input": "red"}] * 129, [{}], "red", [7], [{"input": "red", "speed": 9}]])
def test_a_batch_that_is_none_is_refused_whole(server: ServerProcess, items: Any) -> None:
    body = {"model": "tiny-speech", "items": items}
    answer = http.post(f"{server.base_url}/audio/speech/batch", json=body, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("items"), answer.text


@pytest.mark.parametrize("field", ["model", "stream", "ref_audio", "timeout"])
def test_what_an_item_cannot_have_is_refused_in_its_place(server: ServerProcess, field: str) -> None:
    body = {"model": "tiny-speech", "items": [{"input": "red", field: "tiny-audio"}]}
    (result,) = post(server, body, "/audio/speech/batch").json()["results"]
    assert result["status"] == "error" and result["error"]["param"] == field


def test_voices_are_those_of_the_models(server: ServerProcess) -> None:
    every = server.get("/v1/audio/voices").json()
    assert every["voices"] == ["Reader"] and every["uploaded_voices"] == []
    assert every["models"]["tiny-speech"] == ["Reader"] and every["models"]["tiny-audio"] == []
    assert server.get("/v1/audio/voices", params={"model": "tiny-audio"}).json()["voices"] == []
    assert server.get("/v1/audio/voices", params={"model": "nobody"}).status_code == 404
    upload = http.post(f"{server.base_url}/audio/voices", files={"audio_sample": b"RIFF"}, data={"name": "me"})
    removal = http.delete(f"{server.base_url}/audio/voices/Reader")
    assert upload.status_code == removal.status_code == 400
    assert upload.json()["error"]["code"] == "unsupported_by_model"
