"""The WebSocket `/v1/audio/speech/stream`."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.loopback import http
from support.server import ServerProcess
from support.sound_files import read_file
from support.speech_socket import listening

ROOT = Path(__file__).parents[3]
KEY = "a-key-of-the-tests"
HEADERS = {"authorization": f"Bearer {KEY}"}
CONFIG = {"type": "session.config", "model": "tiny-speech", "voice": "Reader", "seed": 1}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with a key, little patience and short prompts, and a model that replies."""
    config = yaml.safe_load((ROOT / "configs/stages/tiny_speech.yaml").read_text())
    folder = tmp_path_factory.mktemp("narrow")
    (folder / "short.yaml").write_text(yaml.safe_dump({**config, "limits": {"max_prompt_chars": 60}}))
    del config["prompts"]
    (folder / "replies.yaml").write_text(yaml.safe_dump({**config, "outputs": ["thinker", "token2wav"]}))
    (folder / "keys").write_text(KEY)
    configs = [f"short={folder / 'short.yaml'}", f"replies={folder / 'replies.yaml'}"]
    with ServerProcess(configs, ["--api-key-file", str(folder / "keys"), "--body-timeout-s", "2"]) as process:
        yield process


def spoken(server: ServerProcess, words: str) -> bytes:
    body = {"model": "tiny-speech", "input": words, "voice": "Reader", "seed": 1, "response_format": "pcm"}
    return http.post(f"{server.base_url}/audio/speech", json=body, timeout=120).content


def test_sentences_are_said_in_order_as_the_plain_route_says_them(server: ServerProcess) -> None:
    with listening(server) as listener:
        listener.say(**CONFIG, split_granularity="sentence")
        for text in ("red. gre", "en! ", "3"):
            listener.say(type="input.text", text=text)
        listener.say(type="input.done")
        events, frames = listener.hear("session.done")
    starts = [event for event in events if event["type"] == "audio.start"]
    assert [event["sentence_text"] for event in starts] == ["red.", "green!", "3"]
    assert [event["sentence_index"] for event in starts] == [0, 1, 2]
    assert all((event["format"], event["sample_rate"]) == ("pcm", 24_000) for event in starts)
    assert [event["type"] for event in events] == [*["audio.start", "audio.done"] * 3, "session.done"]
    assert events[-1] == {"type": "session.done", "utterance_index": 0, "total_sentences": 3}
    assert b"".join(frames) == b"".join(spoken(server, words) for words in ("red.", "green!", "3"))
    sizes = [event["total_bytes"] for event in events if event["type"] == "audio.done"]
    assert sum(sizes) == sum(map(len, frames)) and len(frames) > 3  # the sound comes in pieces


def test_an_utterance_is_one_sound_where_nothing_is_split_and_another_may_follow(server: ServerProcess) -> None:
    with listening(server) as listener:
        listener.say(**CONFIG)
        for text in ("re", "d gr", "een"):
            listener.say(type="input.text", text=text)
        listener.say(type="input.done")
        _, first = listener.hear("session.done")
        listener.say(**CONFIG, response_format="mp3", encoding="base64")
        listener.say(type="input.text", text="red green")
        listener.say(type="input.done")
        events, none = listener.hear("session.done")
        listener.say(type="session.close")
        assert listener.end() == 1000
    assert b"".join(first) == spoken(server, "red green") and not none
    assert {event["utterance_index"] for event in events} == {1}
    chunks = [event for event in events if event["type"] == "audio.chunk"]
    assert [event["chunk_id"] for event in chunks] == list(range(len(chunks)))
    assert [event["chunk_start_ms"] for event in chunks[1:]] == [event["chunk_end_ms"] for event in chunks[:-1]]
    samples, rate = read_file(b"".join(base64.b64decode(event["audio_b64"]) for event in chunks))
    assert chunks[-1]["chunk_end_ms"] == pytest.approx(len(b"".join(first)) / 48, abs=2)
    assert samples.shape[1] / rate == pytest.approx(chunks[-1]["chunk_end_ms"] / 1000, abs=0.15)


def test_what_is_queued_is_said_before_a_close(server: ServerProcess) -> None:
    with listening(server) as listener:
        listener.say(**CONFIG)
        listener.say(type="input.text", text="red")
        listener.say(type="input.done")
        listener.say(type="session.close")
        events, frames = listener.hear("session.done")
        assert listener.end() == 1000
    assert events[-1]["total_sentences"] == 1 and b"".join(frames) == spoken(server, "red")


def test_mistakes_are_told_and_the_session_goes_on(server: ServerProcess) -> None:
    with listening(server) as listener:
        assert listener.complaint(type="input.text", text="red")["code"] == "not_configured"
        assert listener.complaint(**{**CONFIG, "voice": "nobody"})["param"] == "voice"
        assert listener.complaint(**{**CONFIG, "model": "nobody"})["code"] == "model_not_found"
        assert listener.complaint(**{**CONFIG, "model": "words"})["param"] == "model"
        assert listener.complaint(**CONFIG, split_granularity="word")["param"] == "split_granularity"
        assert listener.complaint(**CONFIG, ref_audio="x")["param"] == "ref_audio"
        assert listener.complaint(type="input.sound")["param"] == "type"
        assert listener.complaint(type="input.text")["param"] == "text"
        assert listener.complaint(type="input.text", text=7)["param"] == "text"
        assert listener.complaint(text="no type")["code"] == "invalid_event"
        for message in ("no json", "[1]", "7", '{"type": 7}', "[" * 100_000, b"bytes"):
            listener.socket.send(message)
            assert listener.hear("error")[0][-1]["error"]["type"] == "invalid_request_error"
        listener.say(**CONFIG)
        listener.say(type="input.text", text="red \ud800")
        listener.say(type="input.done")
        refused, nothing = listener.hear("session.done")
        listener.say(type="input.text", text="red")
        listener.say(type="input.done")
        events, frames = listener.hear("session.done")
    assert [event["type"] for event in refused] == ["error", "session.done"] and not nothing
    assert refused[0]["error"]["param"] == "text" and refused[1]["total_sentences"] == 0
    assert frames and [event["type"] for event in events] == ["audio.start", "audio.done", "session.done"]


def test_an_empty_utterance_has_no_sentence(server: ServerProcess) -> None:
    with listening(server) as listener:
        listener.say(**CONFIG, split_granularity="sentence")
        listener.say(type="input.text", text=" ... \n")
        listener.say(type="input.done")
        events, frames = listener.hear("session.done")
    assert [event["total_sentences"] for event in events] == [0] and not frames


def test_a_listener_who_goes_aborts_what_is_said_and_what_is_queued(server: ServerProcess) -> None:
    with listening(server) as listener:
        listener.say(**CONFIG, split_granularity="sentence")
        listener.say(type="input.text", text="one two three four five. " * 20)
        listener.hear("audio.start")
        (run,) = server.requests()
    server.wait_until_idle(10)
    assert server.get(f"/v1/requests/{run['id']}").json()["status"] != "finished"


def test_an_event_that_is_too_long_ends_the_session(server: ServerProcess) -> None:
    with listening(server) as listener:
        assert listener.complaint(type="input.text", text="a" * 1_000_001)["code"] == "too_large"
        assert listener.end() == 1009
    with listening(server) as listener:
        listener.socket.send("a" * (17 * 2**20))
        assert listener.end() == 1009


def test_a_key_is_needed(narrow: ServerProcess) -> None:
    for headers in ({}, {"authorization": "Bearer another-key"}):
        with pytest.raises(Exception, match=r"40[13]"), listening(narrow, additional_headers=headers):
            pass


def test_a_silent_client_is_told_and_let_go(narrow: ServerProcess) -> None:
    with listening(narrow, additional_headers=HEADERS) as listener:
        assert listener.hear("error")[0][-1]["error"]["code"] == "idle_timeout"
        assert listener.end() == 1008


def test_text_that_waits_is_bounded(narrow: ServerProcess) -> None:
    with listening(narrow, additional_headers=HEADERS) as listener:
        listener.say(**{**CONFIG, "model": "short"})
        assert listener.complaint(type="input.text", text="red " * 16)["param"] == "text"
        listener.say(type="input.text", text="red " * 10)
        assert listener.complaint(type="input.text", text="red " * 6)["code"] == "too_large"


def test_a_model_that_replies_does_not_claim_to_read_out(narrow: ServerProcess) -> None:
    body = {"model": "replies", "input": "red"}
    answer = http.post(f"{narrow.base_url}/audio/speech", json=body, headers=HEADERS, timeout=60)
    assert answer.status_code == 400 and "prompts.speech" in answer.json()["error"]["message"]
    with listening(narrow, additional_headers=HEADERS) as listener:
        assert "prompts.speech" in listener.complaint(**{**CONFIG, "model": "replies"})["message"]
