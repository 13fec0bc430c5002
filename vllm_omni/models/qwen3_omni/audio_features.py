"""Audio -> mel features as the audio encoder reads them, and how many tokens they become. Opens no file."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio_files import Samples
from vllm_omni.worker.ar.media_reading.mel_features import MelFeatures

NUM_HALVINGS = 3  # convolutions with stride 2


class Qwen3OmniAudioFeatures:
    """As of an AudioFeatures, for one checkpoint. Audio may be of any length: the encoder reads it in pieces."""

    def __init__(self, folder: Path, window: int) -> None:
        """window: half the frames of a piece."""
        self._mel = MelFeatures(folder)
        self._window = window

    @property
    def sample_rate(self) -> int:
        return self._mel.sample_rate

    def num_tokens(self, num_samples: int, name: str) -> int:
        hop, rate = self._mel.hop, self.sample_rate
        if num_samples < hop:
            raise InvalidRequestError(
                f"{name}: got {num_samples / rate:.3f} s of sound, expected at least {hop / rate:g} s, one token of "
                "the model"
            )
        return tokens_of_frames(num_samples // hop, self._window)

    def features(self, samples: Samples) -> Tensor:
        return self._mel.of(samples, samples.shape[1])


def tokens_of_frames(num_frames: int, window: int) -> int:
    """Pieces of 2 * window frames are halved each by itself."""
    num_whole, rest = divmod(num_frames, 2 * window)
    return num_whole * _halved(2 * window) + _halved(rest)


def _halved(num_frames: int) -> int:
    for _ in range(NUM_HALVINGS):
        num_frames = (num_frames + 1) // 2
    return num_frames
