"""What voices are cloned from: the codes of a recording and its speaker's vector, as of the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.qwen3_tts import answers, cases, sound, write_folder
from support.qwen3_tts_configs import published_config

from vllm_omni.errors import CheckpointError, ConfigError
from vllm_omni.layers.ecapa import EcapaEncoder
from vllm_omni.models.qwen3_tts.codec.speaker_encoder import SpeakerEncoder, SpeakerEncoderConfig
from vllm_omni.models.qwen3_tts.codec.speech_encoder import SpeechEncoder

CPU = torch.device("cpu")
ANSWERS = answers()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("base"), "base")


@pytest.fixture(scope="module")
def speech_encoder(folder: Path) -> SpeechEncoder:
    return SpeechEncoder.load(folder / "speech_tokenizer", CPU)


def test_codes_are_those_of_the_package(speech_encoder: SpeechEncoder) -> None:
    names = sorted(name for name in ANSWERS if name.startswith("encoder."))
    assert len(names) > 2
    for name in names:
        seconds = float(name.removeprefix("encoder.").removesuffix(".codes"))
        made = speech_encoder.codes(torch.from_numpy(sound(seconds)))
        assert made.dtype == torch.int64
        np.testing.assert_array_equal(made.numpy(), ANSWERS[name])


def test_a_speakers_vector_is_that_of_the_package(folder: Path) -> None:
    case = next(case for case in cases().values() if f"{case.name}.embedding" in ANSWERS)
    assert case.sound_s is not None
    made = SpeakerEncoder.load(folder, CPU).embed(torch.from_numpy(sound(case.sound_s)))
    expected = torch.from_numpy(ANSWERS[f"{case.name}.embedding"])
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)


def test_memory_is_known_from_headers(folder: Path, speech_encoder: SpeechEncoder) -> None:
    tensors = speech_encoder._model.state_dict().values()
    assert SpeechEncoder.weights_bytes(folder / "speech_tokenizer") == sum(tensor.nbytes for tensor in tensors)
    speaker = SpeakerEncoder.load(folder, CPU)
    assert SpeakerEncoder.weights_bytes(folder) == sum(parameter.nbytes for parameter in speaker.parameters())


def test_a_published_speaker_encoder_fits_without_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published_config("1.7B", "base")), encoding="utf-8")
    config = SpeakerEncoderConfig.from_folder(tmp_path)
    with torch.device("meta"):
        encoder = EcapaEncoder(config)
    assert tuple(encoder.mfa.conv.weight.shape) == (1536, 1536, 1)
    assert tuple(encoder.fc.weight.shape) == (2048, 3072, 1)


def test_a_folder_that_cannot_clone_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot clone voices"):
        SpeechEncoder.load(tmp_path, CPU)
    with pytest.raises(ConfigError, match="cannot clone voices"):
        SpeakerEncoder.load(tmp_path, CPU)


@pytest.mark.parametrize(
    ("change", "complaint", "kind"),
    [
        ({"num_filters": 2**30}, "num_filters", ConfigError),
        ({"num_quantizers": 12}, "unexpected tensor", CheckpointError),
        ({"upsampling_ratios": "many"}, "the encoder cannot be made", CheckpointError),
    ],
)
def test_a_damaged_encoder_is_refused(
    folder: Path, tmp_path: Path, change: dict[str, object], complaint: str, kind: type[Exception]
) -> None:
    tokenizer = folder / "speech_tokenizer"
    raw = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
    raw["encoder_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    (tmp_path / "model.safetensors").hardlink_to(tokenizer / "model.safetensors")
    with pytest.raises(kind, match=complaint):
        SpeechEncoder.load(tmp_path, CPU)
