"""What voices are cloned from: reference audio within limits, its codes and its speaker's vector as of the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.qwen3_tts import answers, cases, sound, write_folder
from support.qwen3_tts_configs import published_config

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import CheckpointError, ConfigError, InvalidRequestError
from vllm_omni.layers.ecapa import EcapaEncoder
from vllm_omni.models.qwen3_tts.codec.reference_audio import SAMPLE_RATE, check_reference, read_reference
from vllm_omni.models.qwen3_tts.codec.speaker_encoder import SpeakerEncoder, SpeakerEncoderConfig
from vllm_omni.models.qwen3_tts.codec.speech_encoder import SpeechEncoder

CPU = torch.device("cpu")
ANSWERS = answers()
LIMITS = LimitsConfig(max_audio_s=3600.0)


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


def test_other_rates_and_channels_are_converted() -> None:
    mono = sound(0.5)
    half = read_reference((np.stack([mono, mono])[:, ::2], SAMPLE_RATE // 2), LIMITS, "ref_audio")
    assert half.shape == (len(mono),)
    assert torch.equal(read_reference((mono, SAMPLE_RATE), LIMITS, "ref_audio"), torch.from_numpy(mono))


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (
            (sound(0.1), SAMPLE_RATE),
            r"ref_audio: got 0\.10 s, expected 0\.25 to 60 s of a voice to clone; a voice needs",
        ),
        ((np.zeros(600 * 8000, np.int16), 8000), r"got 600\.00 s, expected 0\.25 to 60 s .* cut it"),
        ((np.zeros(SAMPLE_RATE, np.float32), SAMPLE_RATE), "got silence"),
        ((np.full(SAMPLE_RATE, np.nan, np.float32), SAMPLE_RATE), "NaN or infinite"),
        ((sound(1.0) * 1e4, SAMPLE_RATE), "expected -1 to 1 at full scale"),
        ((sound(1.0), 3), "sampling rate: got 3"),
        ((sound(1.0), "fast"), "sampling rate"),
        ((np.zeros((3, 4, 5), np.float32), SAMPLE_RATE), r"\[channels, n\]"),
        (b"no sound", "ref_audio"),
        (None, "ref_audio"),
    ],
)
def test_what_is_no_voice_is_refused(source: object, complaint: str) -> None:
    with pytest.raises(InvalidRequestError, match=complaint):
        read_reference(source, LIMITS, "ref_audio")


def test_length_is_checked_before_anything_is_decoded() -> None:
    assert check_reference((sound(1.0), SAMPLE_RATE), LIMITS, "ref_audio") == 1.0
    with pytest.raises(InvalidRequestError, match=r"got 600\.00 s"):
        check_reference((np.zeros(600 * 8000, np.int16), 8000), LIMITS, "ref_audio")


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
    (tmp_path / "model.safetensors").symlink_to(tokenizer / "model.safetensors")
    with pytest.raises(kind, match=complaint):
        SpeechEncoder.load(tmp_path, CPU)
