"""Audio -> mel features as the audio encoder reads them, and how many tokens they become. Opens no file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vllm_omni.errors import CheckpointError, InvalidRequestError
from vllm_omni.media.audio_files import Samples


class AudioFeatures:
    """A checkpoint's feature extractor (Whisper's log mel spectrogram, arXiv:2212.04356, section 2.2)."""

    def __init__(self, folder: Path) -> None:
        from transformers import WhisperFeatureExtractor

        try:
            self._extractor = WhisperFeatureExtractor.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the library raises whatever its parsers raise
            raise CheckpointError(f"{folder}: the feature extractor cannot be read ({error})") from error

    @property
    def sample_rate(self) -> int:
        return int(self._extractor.sampling_rate)

    def num_tokens(self, duration_s: float, name: str) -> int:
        """Of audio of this length; InvalidRequestError for what is too short or too long for the encoder."""
        hop, longest = self._extractor.hop_length, self._extractor.n_samples
        num_samples = round(duration_s * self.sample_rate)
        if num_samples > longest:
            raise InvalidRequestError(
                f"{name}: got {duration_s:.2f} s of sound, expected at most {longest / self.sample_rate:g} s, what the "
                "model hears in one piece; cut it"
            )
        num_tokens = tokens_of_frames(-(-num_samples // hop))
        if num_tokens < 1:
            raise InvalidRequestError(
                f"{name}: got {duration_s:.3f} s of sound, expected at least {3 * hop / self.sample_rate:g} s, "
                "one token of the model"
            )
        return num_tokens

    def features(self, samples: Samples) -> Tensor:
        """samples: float32 [1, n] at `sample_rate`. Returns float32 [mel, frames], no padding."""
        hop, num_samples = self._extractor.hop_length, samples.shape[1]
        # Padded to the full length, as the encoder was trained, short audio would cost as much as the longest; what
        # its frames see of the padding is one window.
        padded = -(-(num_samples + self._extractor.n_fft) // hop) * hop
        made = self._extractor(
            samples[0],
            sampling_rate=self.sample_rate,
            padding="max_length",
            max_length=min(padded, self._extractor.n_samples),
            return_attention_mask=True,
            return_tensors="pt",
        )
        num_frames = int(made["attention_mask"][0].sum())
        features: Tensor = made["input_features"][0, :, :num_frames]
        return features.to(torch.float32).contiguous()


def tokens_of_frames(num_frames: int) -> int:
    """The encoder's convolution and pooling halve the frames, each."""
    return max(0, ((num_frames - 1) // 2 - 1) // 2 + 1)
