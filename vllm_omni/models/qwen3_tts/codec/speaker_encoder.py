"""Reference audio to the vector of its speaker: a log mel spectrogram, then ECAPA-TDNN. In float32: it is small, and
runs once for a voice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.errors import ConfigError
from vllm_omni.layers.ecapa import EcapaEncoder, check_ecapa
from vllm_omni.layers.meta_device import on_meta_device
from vllm_omni.layers.weights import Target, allocate, load_weights, weights_bytes
from vllm_omni.models.qwen3_tts.codec.config import published_values
from vllm_omni.models.qwen3_tts.codec.published import SAMPLE_RATE
from vllm_omni.utils.checks import brief
from vllm_omni.utils.files import read_json

PREFIX = "speaker_encoder."
SECTION = "speaker_encoder_config"
FFT, HOP = 1024, 256
MIN_POWER, MIN_LEVEL = 1e-9, 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeakerEncoderConfig:
    """`speaker_encoder_config` of a checkpoint."""

    mel_dim: int = 128
    enc_dim: int = 1024
    enc_channels: tuple[int, ...] = (512, 512, 512, 512, 1536)
    enc_kernel_sizes: tuple[int, ...] = (5, 3, 3, 3, 1)
    enc_dilations: tuple[int, ...] = (1, 2, 3, 4, 1)
    enc_attention_channels: int = 128
    enc_res2net_scale: int = 8
    enc_se_channels: int = 128
    sample_rate: int = SAMPLE_RATE

    @classmethod
    def from_folder(cls, folder: Path) -> SpeakerEncoderConfig:
        where = f"{folder / 'config.json'}: {SECTION}"
        raw = read_json(folder / "config.json").get(SECTION)
        if not isinstance(raw, dict):
            raise ConfigError(f"{where}: got {brief(raw)}, expected an object; the checkpoint cannot clone voices")
        config = cls(**published_values(cls, raw, where))
        check_ecapa(config, where)
        if config.sample_rate != SAMPLE_RATE:
            raise ConfigError(f"{where}: sample_rate: got {config.sample_rate}, expected {SAMPLE_RATE}")
        if any(width % config.enc_res2net_scale for width in config.enc_channels[1:-1]):
            raise ConfigError(
                f"{where}: enc_channels: got {list(config.enc_channels)}, expected multiples of enc_res2net_scale,"
                f" {config.enc_res2net_scale}"
            )
        return config


class SpeakerEncoder(nn.Module):
    """Made by `load`."""

    def __init__(self, config: SpeakerEncoderConfig) -> None:
        super().__init__()
        self.encoder = EcapaEncoder(config)
        self._mel_dim = config.mel_dim

    @classmethod
    def load(cls, folder: Path, device: torch.device, variant: str | None = None) -> SpeakerEncoder:
        """folder: of a checkpoint that clones voices. CheckpointError where tensors are missing or misshapen."""
        config = SpeakerEncoderConfig.from_folder(folder)
        with on_meta_device():
            model = cls(config)
        allocate(model, device, torch.float32)
        load_weights(model, folder, PREFIX, variant)
        return model

    @staticmethod
    def weights_bytes(folder: Path, variant: str | None = None) -> int:
        """Once loaded, from the headers."""
        return weights_bytes(folder, torch.float32.itemsize, PREFIX, variant=variant)

    @torch.inference_mode()
    def embed(self, audio: Tensor) -> Tensor:
        """[n] float32 at 24 kHz, of a length that is checked -> [dim] float32 on the encoder's device."""
        vector: Tensor = self.encoder(mel_spectrogram(audio.to(self.encoder.fc.weight.device), self._mel_dim))
        return vector

    def locate(self, name: str) -> Target | None:
        return Target("encoder." + name.removeprefix(PREFIX))

    def is_ignored(self, name: str) -> bool:
        return False


def mel_spectrogram(audio: Tensor, num_mels: int) -> Tensor:
    """[n] at 24 kHz -> [frames, num_mels]: logarithms of magnitudes in bands up to half the rate."""
    from transformers.audio_utils import mel_filter_bank

    bands = mel_filter_bank(
        num_frequency_bins=FFT // 2 + 1,
        num_mel_filters=num_mels,
        min_frequency=0.0,
        max_frequency=SAMPLE_RATE / 2,
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    side = (FFT - HOP) // 2
    padded = F.pad(audio[None], (side, side), mode="reflect")[0]
    window = torch.hann_window(FFT, device=audio.device)
    spectrum = torch.stft(padded, FFT, HOP, window=window, center=False, return_complex=True)
    magnitudes = (torch.view_as_real(spectrum).square().sum(dim=-1) + MIN_POWER).sqrt()
    levels = torch.from_numpy(bands).to(audio.device, torch.float32).T @ magnitudes
    return levels.clamp(min=MIN_LEVEL).log().T
