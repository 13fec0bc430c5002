"""How near speech is to the recording that it was learnt from: periodicity and pitch of voiced frames, and spectra.

Legend: n samples, T frames of 10 ms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.tiny.speech.mel import SAMPLE_RATE, log_mel

WINDOW, HOP = 1200, 240
HIGHEST_HZ, LOWEST_HZ = 400, 70
VOICED, LOUD = 0.6, 0.01  # correlation and level of frames that count
AUDIBLE = -2  # of the loudest band of a log-mel frame


@dataclass(frozen=True, slots=True)
class Likeness:
    """periodicity: mean of the recording's voiced frames, minus that of the same frames of the speech. pitch: mean
    distance in semitones. mel: mean distance of log-mel bands where the recording is heard.
    """

    periodicity: float
    pitch: float
    mel: float


def likeness(speech: Tensor, recording: Tensor) -> Likeness:
    """[n] float32 at 24 kHz each, beginning together; the shorter one is followed by silence."""
    length = max(len(speech), len(recording))
    ours, theirs = (F.pad(one, (0, length - len(one))) for one in (speech, recording))
    (our_period, our_lag), (their_period, their_lag) = periods(ours), periods(theirs)
    voiced = (their_period > VOICED) & (level(theirs) > LOUD)
    said = voiced & (our_period > VOICED)
    mel = log_mel(theirs)
    heard = mel.amax(1) > AUDIBLE
    return Likeness(
        float((their_period - our_period)[voiced].mean()),
        float((12 * (our_lag.log2() - their_lag.log2()).abs())[said].mean()),
        float((log_mel(ours) - mel)[heard].abs().mean()),
    )


def windows(samples: Tensor) -> Tensor:
    """[n] -> [T, WINDOW]"""
    return F.pad(samples, (WINDOW // 2, WINDOW // 2)).unfold(0, WINDOW, HOP)


def level(samples: Tensor) -> Tensor:
    return windows(samples).square().mean(1).sqrt()


def periods(samples: Tensor) -> tuple[Tensor, Tensor]:
    """(how alike every frame is to itself a period later, 0 to 1, [T]; that period in samples, [T])."""
    frames = windows(samples)
    lags = torch.arange(SAMPLE_RATE // HIGHEST_HZ, SAMPLE_RATE // LOWEST_HZ)
    span = WINDOW - int(lags[-1])
    now = frames[:, :span]
    later = torch.stack([frames[:, lag : lag + span] for lag in lags.tolist()], 1)
    products = (now[:, None] * later).sum(-1)
    sizes = (now.square().sum(-1)[:, None] * later.square().sum(-1)).sqrt()
    found = products / (sizes + 1e-6)
    best, place = found.max(1)
    return best.clamp(0, 1), lags[place].float()
