"""The sound of a voice that is to be cloned: read from whatever a caller gives, within limits, at the codec's rate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio_input import check_audio, read_audio

SAMPLE_RATE = 24_000  # Hz, of both encoders
MIN_S, MAX_S = 0.25, 60.0  # memory grows with it; half a minute says all that there is to say of a voice
MIN_PEAK = 1e-3  # 60 dB below full scale


def check_reference(source: object, limits: LimitsConfig, name: str) -> float:
    """All that can be checked without decoding -> seconds. Arguments and errors as of `media.audio_input.check_audio`,
    and InvalidRequestError for what is too short or too long for a voice.
    """
    duration_s = check_audio(source, channels=1, limits=limits, name=name)
    _check_length(duration_s, name)
    return duration_s


def read_reference(source: object, limits: LimitsConfig, name: str, stop: Callable[[], None] = lambda: None) -> Tensor:
    """[n] float32 at 24 kHz. Arguments and errors as of `media.audio_input.read_audio`, and InvalidRequestError for what
    is too short, too long or silent.
    """
    check_reference(source, limits, name)
    samples = read_audio(source, sample_rate=SAMPLE_RATE, channels=1, limits=limits, name=name, stop=stop)
    audio = torch.from_numpy(samples[0])
    _check_length(len(audio) / SAMPLE_RATE, name)
    peak = float(audio.abs().max())
    if peak < MIN_PEAK:
        raise InvalidRequestError(
            f"{name}: got silence (its loudest sample is {peak:.1g} of full scale), expected a voice; record it louder"
        )
    return audio


def _check_length(duration_s: float, name: str) -> None:
    if not MIN_S <= duration_s <= MAX_S:
        fix = "a voice needs a few seconds" if duration_s < MIN_S else "cut it: a few seconds of clear speech are best"
        raise InvalidRequestError(
            f"{name}: got {duration_s:.2f} s, expected {MIN_S:g} to {MAX_S:g} s of a voice to clone; {fix}"
        )
