"""A sound that a voice is to be cloned from: read, and refused where no voice can be heard from it."""

from __future__ import annotations

from collections.abc import Callable

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.media.audio_files import Samples
from vllm_omni.media.audio_input import check_audio, read_audio
from vllm_omni.media.source_files import caller_media
from vllm_omni.voices import SAMPLE_RATE, check_reference


@caller_media()
def read_reference(
    source: object, *, limits: LimitsConfig, name: str, stop: Callable[[], None] = lambda: None
) -> Samples:
    """[n] float32 at 24 kHz, one channel. Arguments and errors as `read_audio`; the length is checked before a sample
    is decoded.
    """
    check_reference(check_audio(source, channels=1, limits=limits, name=name))
    sound = read_audio(source, sample_rate=SAMPLE_RATE, channels=1, limits=limits, name=name, stop=stop)[0]
    check_reference(len(sound) / SAMPLE_RATE, sound)
    return sound
