"""The whole graph as shipped: text to audio, equal to the qwen-tts package's, offline, streamed, served and shown."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from openai import BadRequestError, OpenAI
from support.examples import sound as read_sound
from support.examples import succeed
from support.loopback import http
from support.qwen3_tts import Case, answers, cases, sound, write_folder
from support.qwen3_tts_configs import TASKS
from support.server import ServerProcess
from support.sound_files import read_pcm
from support.speech_socket import listening
from support.talkers import GREEDY_FIELDS, fields_of

from vllm_omni import Omni, SamplingParams
from vllm_omni.config.shipped import find_config
from vllm_omni.entrypoints.cli.app import main
from vllm_omni.errors import InvalidRequestError

ANSWERS, CASES = answers(), cases()
PARAMS = SamplingParams(temperature=0, max_tokens=8)
SAMPLES = 192  # of a frame of the tiny codec


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {task: write_folder(tmp_path_factory.mktemp(task), task) for task in TASKS}


@pytest.fixture(scope="module")
def omnis(folders: dict[str, Path]) -> Iterator[dict[str, Omni]]:
    outputs = ["outputs=[speech, talker.codes]"]
    made = {
        task: Omni(model=str(folder), overrides=outputs, device="cpu", dtype="float32", progress=False)
        for task, folder in folders.items()
    }
    yield made
    for omni in made.values():
        omni.close()


def prompt(case: Case) -> dict[str, object]:
    return {"prompt": case.text, **GREEDY_FIELDS, **fields_of(case)}


@pytest.mark.parametrize("task", TASKS)
def test_a_crowd_sounds_as_the_package_does(omnis: dict[str, Omni], task: str) -> None:
    mine = [case for case in CASES.values() if case.task == task]
    for case, output in zip(mine, omnis[task].generate([prompt(case) for case in mine], PARAMS), strict=True):
        assert output.error is None, output.error
        assert torch.equal(output.tensors["talker.codes"], torch.from_numpy(ANSWERS[f"{case.name}.codes"]))
        np.testing.assert_allclose(output.audios[0].samples[0], ANSWERS[f"{case.name}.waveform"], atol=1e-4)


def test_audio_leaves_with_the_first_frame_and_its_pieces_are_the_whole(omnis: dict[str, Omni]) -> None:
    *parts, final = omnis["custom_voice"].stream(prompt(CASES["speaker"]), PARAMS)
    pieces = [audio.samples for part in parts for audio in part.audios]
    assert pieces[0].shape[1] == SAMPLES and len(pieces) > 2
    np.testing.assert_array_equal(np.concatenate(pieces, 1), final.audios[0].samples)
    np.testing.assert_allclose(final.audios[0].samples[0], ANSWERS["speaker.waveform"], atol=1e-4)


def test_one_that_is_refused_harms_nobody(omnis: dict[str, Omni]) -> None:
    wrong, right = omnis["custom_voice"].generate(
        [{"prompt": "Hello", "voice": "nobody"}, prompt(CASES["speaker"])], PARAMS
    )
    assert isinstance(wrong.error, InvalidRequestError) and "voice" in str(wrong.error)
    assert right.error is None and right.audios


def test_check_lists_the_voices(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "qwen3_tts", "--model", str(folders["custom_voice"])]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "vivian" in shown and "custom voice" in shown and "codes" in shown


def test_the_example_speaks(folders: dict[str, Path], tmp_path: Path) -> None:
    soundfile.write(tmp_path / "me.wav", sound(0.9), 24_000)
    little = ("--max-seconds", "0.5", "--model")
    shown = succeed("qwen3_tts.py", "Hello", *little, str(folders["base"]), "--ref-audio", "me.wav", folder=tmp_path)
    samples, rate = read_sound(tmp_path / "speech.wav")
    assert rate == 24_000 and 0 < samples <= 6 * SAMPLES and f"{samples / rate:.2f} s, seed 0" in shown


def test_the_folder_may_go_when_it_is_loaded(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "custom_voice")
    with Omni(model=str(folder), device="cpu", dtype="float32", progress=False) as omni:
        folder.rename(tmp_path / "elsewhere")
        (output,) = omni.generate(prompt(CASES["speaker"]), PARAMS)
    assert output.error is None and output.audios


@pytest.fixture(scope="module")
def server(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder, configs = tmp_path_factory.mktemp("served"), []
    for task in ("custom_voice", "base"):
        shipped = yaml.safe_load(find_config("qwen3_tts").read_text())
        config = {**shipped, "name": task, "model": str(folders[task])}
        for stage in config["stages"].values():
            stage |= {"device": "cpu", "dtype": "float32"}
        config["stages"]["talker"]["defaults"] = {"max_tokens": 6}
        if task == "base":
            config["stages"]["talker"]["voices"] = {"folder": str(folder / "voices")}
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(config))
        configs.append(f"{task}={folder / f'{task}.yaml'}")
    # in its process the same frames are decoded in the same step every time, so that sounds can be compared bit for bit
    with ServerProcess(configs, apart=False) as process:
        yield process
        assert "Traceback" not in process.errors, process.errors


def test_the_servers_speech_route_speaks_in_every_manner(server: ServerProcess) -> None:
    client = OpenAI(base_url=server.base_url, api_key="none", max_retries=0)

    def say(model: str = "custom_voice", voice: str = "vivian", **fields: object) -> np.ndarray:
        spoken = client.audio.speech.create(
            model=model, input="Hello world", voice=voice, response_format="pcm", extra_body=fields
        )
        return read_pcm(spoken.content)

    greedy = {"language": "english", "subtalker_temperature": 0.0, "seed": 3}
    first, again = say(**greedy), say(**greedy)
    assert 0 < len(first) <= 6 * SAMPLES and np.array_equal(first, again)
    assert not np.array_equal(first, say(**{**greedy, "seed": 4}))
    assert len(say(max_new_tokens=2, task_type="CustomVoice", seed=3)) <= 2 * SAMPLES
    assert len(say(instructions="Very slowly.", voice="Ryan", seed=3))
    assert not np.array_equal(first, say(**greedy, non_streaming_mode=False))  # its text stands beside the frames
    file = io.BytesIO()
    soundfile.write(file, sound(0.9), 24_000, format="WAV")
    recording = "data:audio/wav;base64," + base64.b64encode(file.getvalue()).decode()
    cloned = say("base", "default", ref_audio=recording, x_vector_only_mode=True, seed=3)
    assert len(cloned)
    assert server.get("/v1/audio/voices").json()["models"]["custom_voice"][:2] == ["aiden", "sohee"]
    for fields, param in (({"language": "klingon"}, "language"), ({"ref_audio": recording}, "ref_audio")):
        with pytest.raises(BadRequestError, match=param):
            say(**fields)
    with pytest.raises(BadRequestError, match="vivian"):
        say(voice="vivien")


def test_a_kept_voice_speaks_as_a_request_that_brings_its_recording(server: ServerProcess) -> None:
    client = OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
    file = io.BytesIO()
    soundfile.write(file, sound(0.9), 24_000, format="WAV")
    fields = {"name": "anna", "consent": "Anna, by letter", "text": "hello world", "model": "base"}
    kept = http.post(
        f"{server.base_url}/audio/voices", data=fields, files={"audio_sample": file.getvalue()}, timeout=60
    )
    assert kept.status_code == 200, kept.text
    recording = "data:audio/wav;base64," + base64.b64encode(file.getvalue()).decode()
    brought = {"ref_audio": recording, "ref_text": "hello world"}
    said = [
        client.audio.speech.create(
            model="base", input="Hello", voice=voice, response_format="pcm", extra_body={"seed": 3, **own}
        ).content
        for voice, own in (("anna", {}), ("default", brought), ("anna", {"x_vector_only_mode": True}))
    ]
    assert said[0] and said[0] == said[1] != said[2]
    assert http.delete(f"{server.base_url}/audio/voices/anna").json()["deleted"]


SAID = {"voice": "vivian", "language": "english", "subtalker_temperature": 0.0, "seed": 3}


def test_the_speech_socket_speaks_before_the_last_word_comes(server: ServerProcess) -> None:
    """Utterance after utterance, as the plain route says the whole text with text and frames side by side."""
    texts = ("Hello world, hello again.", "Hello world.")
    with listening(server) as listener:
        listener.say(type="session.config", model="custom_voice", **SAID)
        for place, text in enumerate(texts):
            listener.say(type="input.text", text=" ")
            listener.say(type="input.text", text=text[:12])
            start, sound = listener.hear("audio.start")[0][-1], [listener.socket.recv(timeout=60)]
            assert start["sentence_text"] == text[:12] and start["utterance_index"] == place
            listener.say(type="input.text", text=text[12:])
            listener.say(type="input.done")
            events, frames = listener.hear("session.done")
            assert events[-1] == {"type": "session.done", "utterance_index": place, "total_sentences": 1}
            body = {
                "model": "custom_voice",
                "input": text,
                "response_format": "pcm",
                "non_streaming_mode": False,
                **SAID,
            }
            whole = http.post(f"{server.base_url}/audio/speech", json=body, timeout=60).content
            assert b"".join([*sound, *frames]) == whole and len(whole)  # type: ignore[list-item]


def test_what_breaks_off_on_the_socket_harms_no_later_utterance(server: ServerProcess) -> None:
    """A text that is too long, a deadline between two words, a client who goes between two words."""
    with listening(server) as listener:
        listener.say(type="session.config", model="custom_voice", timeout=0.5, **SAID)
        listener.say(type="input.text", text="Hello wor")
        events, _ = listener.hear("audio.done")
        assert events[-1]["error"] and "0.5 s" in next(e for e in events if e["type"] == "error")["error"]["message"]
        listener.say(type="input.text", text="ld of the late")
        listener.say(type="input.done")
        listener.hear("session.done")
        listener.say(type="session.config", model="custom_voice", **SAID)
        assert "expected at most" in listener.complaint(type="input.text", text="a " * 50_001)["message"]
        listener.say(type="input.text", text="Hello world.")
        listener.say(type="session.close")
        events, frames = listener.hear("audio.done")
        assert not events[-1]["error"] and frames
        listener.end()
    with listening(server) as listener:
        listener.say(type="session.config", model="custom_voice", **SAID)
        listener.say(type="input.text", text="Hello wor")
        listener.hear("audio.start")
    while server.get("/v1/requests").json()["data"]:
        time.sleep(0.01)
