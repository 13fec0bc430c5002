"""What the encoders make of a recording is kept, and is what they would make of it again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.qwen3_tts import answers, sound, write_folder
from torch import Tensor

from vllm_omni.models.qwen3_tts import cloned_voice
from vllm_omni.models.qwen3_tts.cloned_voice import VoiceCloner
from vllm_omni.models.qwen3_tts.codec.speaker_encoder import SpeakerEncoder
from vllm_omni.models.qwen3_tts.codec.speech_encoder import SpeechEncoder


def counted(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[int]:
    """Samples of each call from now on."""
    lengths, plain = list[int](), getattr(owner, name)

    def call(self: object, samples: Tensor) -> Tensor:
        lengths.append(len(samples))
        return plain(self, samples)

    monkeypatch.setattr(owner, name, call)
    return lengths


def test_a_recording_that_comes_again_is_not_encoded_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cloner = VoiceCloner.load(write_folder(tmp_path, "base"), torch.device("cpu"), None)
    embedded = counted(monkeypatch, SpeakerEncoder, "embed")
    coded = counted(monkeypatch, SpeechEncoder, "codes")

    def clone(seconds: float, has_frames: bool) -> cloned_voice.ClonedVoice:
        return cloner.clone(torch.from_numpy(sound(seconds)), has_frames)

    alone, whole, again = clone(0.9, False), clone(0.9, True), clone(0.9, True)
    assert alone.frames is None and clone(0.9, False).frames is None
    assert whole.frames is not None and whole.frames.tolist() == answers()["encoder.0.9.codes"].tolist()
    assert again.frames is whole.frames and again.embedding is alone.embedding
    assert embedded == coded == [21600]

    monkeypatch.setattr(cloned_voice, "MAX_KEPT", 2)
    clone(0.6, False)
    clone(0.9, True)
    clone(0.7, False)  # 0.6 s were used least recently
    clone(0.9, True)
    clone(0.6, False)
    assert embedded == [21600, 14400, 16800, 14400] and coded == [21600]
