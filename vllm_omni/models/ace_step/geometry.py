"""How seconds, samples, latent frames and audio codes of an ACE-Step folder relate. Knows no request."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_omni.errors import ConfigError
from vllm_omni.models.ace_step.folder import AceStepFolder
from vllm_omni.utils.checks import check_number

FRAMES_PER_CODE = 5  # where the folder does not say


@dataclass(frozen=True, slots=True)
class MusicGeometry:
    """Read once per stage; the stage that reads requests and the one that makes the audio share the arithmetic."""

    sample_rate: int  # Hz
    channels: int  # of the audio
    hop: int  # samples of a latent frame
    frames_per_code: int  # latent frames of one audio code

    @classmethod
    def from_folder(cls, folder: AceStepFolder) -> MusicGeometry:
        """From the configurations of `vae` and, where it is there, of `audio_token_detokenizer`."""
        where, strides = folder.config_file("vae"), folder.config("vae").get("downsampling_ratios")
        if not isinstance(strides, list) or not strides:
            raise ConfigError(f"{where}: downsampling_ratios: got {strides!r}, expected a list of integers")
        for stride in strides:
            check_number(f"{where}: downsampling_ratios", stride, 1, integer=True, raises=ConfigError)
        return cls(
            sample_rate=folder.count("vae", "sampling_rate"),
            channels=folder.count("vae", "audio_channels"),
            hop=math.prod(strides),
            frames_per_code=_frames_per_code(folder),
        )

    @property
    def frame_s(self) -> float:
        """Seconds of a latent frame."""
        return self.hop / self.sample_rate

    @property
    def code_s(self) -> float:
        """Seconds of an audio code."""
        return self.frames_per_code * self.frame_s

    @property
    def frames_per_s(self) -> float:
        return self.sample_rate / self.hop

    def num_frames(self, duration_s: float) -> int:
        """Latent frames of a result that lasts so long."""
        return math.ceil(duration_s * self.frames_per_s)

    def num_codes(self, num_frames: int) -> int:
        """Audio codes that cover so many latent frames."""
        return -(-num_frames // self.frames_per_code)

    def frame_at(self, time_s: float) -> int:
        """The latent frame in which a moment lies."""
        return int(time_s * self.frames_per_s)


def _frames_per_code(folder: AceStepFolder) -> int:
    part, key = "audio_token_detokenizer", "pool_window_size"
    if not folder.config_file(part).is_file() or key not in folder.config(part):
        return FRAMES_PER_CODE
    return folder.count(part, key)
