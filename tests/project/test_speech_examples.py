"""The examples of speech run with a tiny random checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from support.examples import picture, sound, succeed
from support.speech import save_tiny_omni

from vllm_omni import Audio, Omni, SamplingParams
from vllm_omni.config.loader import load_config

SYSTEM = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech."
)
LITTLE = ("--max-tokens", "6", "--max-seconds", "0.8")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_omni(tmp_path_factory.mktemp("qwen_omni")))


def test_speech_chat_answers_in_words_and_sound_with_its_own_picture_and_tone(tmp_path: Path, checkpoint: str) -> None:
    shown = succeed("speech_chat.py", "--model", checkpoint, *LITTLE, "-o", "reply.wav", folder=tmp_path)
    assert "(image, audio)" in shown and "wrote " in shown
    samples, rate = sound(tmp_path / "reply.wav")
    assert rate == 24_000 and f"{samples / rate:.2f} s at 24000 Hz" in shown


def test_speech_chat_takes_files_and_a_voice(tmp_path: Path, checkpoint: str) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "ball.png")
    Audio(np.zeros((1, 8000), np.float32), 8000).save(tmp_path / "tone.wav")
    media = ("--image", "ball.png", "--audio", "tone.wav", "--speaker", "Ethan")
    succeed("speech_chat.py", "Who?", "--model", checkpoint, *media, *LITTLE, "-o", "reply.flac", folder=tmp_path)
    assert sound(tmp_path / "reply.flac")[0] > 0


def test_stream_speech_writes_the_pieces_as_they_come(tmp_path: Path, checkpoint: str) -> None:
    shown = succeed(
        "stream_speech.py", "Hello", "--model", checkpoint, *LITTLE, "--seed", "2", "-o", "out", folder=tmp_path
    )
    pieces = re.findall(r"([\d.]+) s  piece (\d+): [\d.]+ s of sound from ([\d.]+) s on", shown)
    came, numbers, starts = zip(*((float(a), int(b), float(c)) for a, b, c in pieces), strict=True)
    assert numbers == tuple(range(1, len(pieces) + 1)) and len(pieces) > 1
    assert sorted(came) == list(came) and sorted(starts) == list(starts) and starts[0] == 0
    info = soundfile.info(tmp_path / "out" / "speech.wav")
    assert info.samplerate == 24_000 and f"{info.duration:.2f} s in {len(pieces)} pieces" in shown
    assert picture(tmp_path / "out" / "timeline.png").size == (900, 295)


def test_the_system_message_is_that_of_the_model_card() -> None:
    """Word for word as Qwen2.5-Omni's model card wants it ("Prompt for audio output"): speech fails under others."""
    assert load_config("qwen_omni.yaml").stages["thinker"].options.system_prompt == SYSTEM


def test_the_thinker_alone_loads_nothing_else(checkpoint: str) -> None:
    with Omni(model=checkpoint, overrides=["outputs=[thinker]"]) as omni:
        (output,) = omni.generate("hello", SamplingParams(max_tokens=3))
        assert list(omni.get_metrics()["stages"]) == ["thinker"] and omni.get_metrics()["num_models"] == 1
    assert output.error is None and not output.audios and list(output.metrics) == ["thinker"]
