"""A checkpoint's feature extractor (Whisper's log mel spectrogram, arXiv:2212.04356, section 2.2). Opens no audio."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vllm_omni.errors import CheckpointError
from vllm_omni.media.audio_files import Samples


class MelFeatures:
    """Audio -> mel features as its encoder was trained on them."""

    def __init__(self, folder: Path) -> None:
        from transformers import WhisperFeatureExtractor

        try:
            self._extractor = WhisperFeatureExtractor.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the library raises whatever its parsers raise
            raise CheckpointError(f"{folder}: the feature extractor cannot be read ({error})") from error

    @property
    def sample_rate(self) -> int:
        return int(self._extractor.sampling_rate)

    @property
    def hop(self) -> int:
        """Samples of a frame."""
        return int(self._extractor.hop_length)

    @property
    def window(self) -> int:
        """Samples that a frame sees."""
        return int(self._extractor.n_fft)

    @property
    def longest(self) -> int:
        """Samples that the extractor was made for."""
        return int(self._extractor.n_samples)

    def of(self, samples: Samples, length: int) -> Tensor:
        """samples: float32 [1, n], padded to `length` -> float32 [mel bins, frames], those of padding alone left
        out.
        """
        made = self._extractor(
            samples[0],
            sampling_rate=self.sample_rate,
            padding="max_length",
            max_length=length,
            truncation=False,
            return_attention_mask=True,
            return_tensors="pt",
        )
        num_frames = int(made["attention_mask"][0].sum())
        features: Tensor = made["input_features"][0, :, :num_frames]
        return features.to(torch.float32).contiguous()
