"""A voice that is taken from a recording: what the talker's prompt holds of it, and what makes that of samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio_input import read_audio
from vllm_omni.models.qwen3_tts.request import REF_AUDIO
from vllm_omni.worker.background import Stop

SAMPLE_RATE = 24000
LEAST_LEVEL = 1e-4  # root mean square; 80 dB below full scale is no speech


@dataclass(frozen=True, slots=True, eq=False)
class ClonedVoice:
    """On the device, in the dtype of the talker."""

    embedding: Tensor  # [D], D being the talker's hidden size
    frames: Tensor | None = None  # [n, codebooks] int64, of a recording that stands in the prompt


class VoiceCloner(Protocol):
    """The encoders of a checkpoint."""

    def clone(self, samples: Tensor, has_frames: bool) -> ClonedVoice:
        """samples: [n] float32 at SAMPLE_RATE, on the CPU. has_frames: whether the frames are wanted, too."""


def read_recording(source: object, limits: LimitsConfig, stop: Stop) -> Tensor:
    """[n] float32 at SAMPLE_RATE; InvalidRequestError for what cannot be read, and for silence."""
    from torch import from_numpy

    samples = from_numpy(
        read_audio(source, sample_rate=SAMPLE_RATE, channels=1, limits=limits, name=REF_AUDIO, stop=stop)
    )[0]
    if float(samples.square().mean().sqrt()) < LEAST_LEVEL:
        raise InvalidRequestError(f"{REF_AUDIO}: got silence, expected a voice")
    return samples
