"""Audio -> mel features as the audio encoder reads them, and how many tokens they become. Opens no file."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio_files import Samples
from vllm_omni.worker.ar.media_reading.mel_features import MelFeatures


class OmniAudioFeatures:
    """As of an AudioFeatures, for one checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._mel = MelFeatures(folder)

    @property
    def sample_rate(self) -> int:
        return self._mel.sample_rate

    def num_tokens(self, num_samples: int, name: str) -> int:
        hop, longest, rate = self._mel.hop, self._mel.longest, self.sample_rate
        if num_samples > longest:
            raise InvalidRequestError(
                f"{name}: got {num_samples / rate:.2f} s of sound, expected at most {longest / rate:g} s, what the "
                "model hears in one piece; cut it"
            )
        num_tokens = tokens_of_frames(-(-num_samples // hop))
        if num_tokens < 1:
            raise InvalidRequestError(
                f"{name}: got {num_samples / rate:.3f} s of sound, expected at least {3 * hop / rate:g} s, one token "
                "of the model"
            )
        return num_tokens

    def features(self, samples: Samples) -> Tensor:
        # Padded to the full length, as the encoder was trained, short audio would cost as much as the longest; what
        # its frames see of the padding is one window.
        padded = -(-(samples.shape[1] + self._mel.window) // self._mel.hop) * self._mel.hop
        return self._mel.of(samples, min(padded, self._mel.longest))


def tokens_of_frames(num_frames: int) -> int:
    """The encoder's convolution and pooling halve the frames, each."""
    return max(0, ((num_frames - 1) // 2 - 1) // 2 + 1)
