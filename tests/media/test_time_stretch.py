"""Sound at another speed."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.time_stretch import TimeStretch

RATE = 24_000


def tone(channels: int = 1, seconds: float = 2.0) -> np.ndarray:
    times = np.arange(round(RATE * seconds)) / RATE
    return np.stack([0.5 * np.sin(2 * np.pi * 440 * (k + 1) * times) for k in range(channels)]).astype(np.float32)


def stretched(speed: float, samples: np.ndarray, piece: int) -> np.ndarray:
    stretch = TimeStretch(speed, RATE, len(samples))
    pieces = [stretch.write(samples[:, start : start + piece]) for start in range(0, samples.shape[1], piece)]
    return np.concatenate([*pieces, stretch.close()], axis=1)


@pytest.mark.parametrize("speed", [0.25, 0.5, 0.8, 1.5, 2.0, 3.3, 4.0])
@pytest.mark.parametrize("channels", [1, 2])
def test_the_length_changes_and_the_pitch_stays(speed: float, channels: int) -> None:
    samples = tone(channels)
    got = stretched(speed, samples, samples.shape[1])
    assert len(got) == channels and abs(got.shape[1] - samples.shape[1] / speed) < 0.06 * RATE  # windows at the end
    for channel in range(channels):
        spectrum = np.abs(np.fft.rfft(got[channel]))
        assert spectrum.argmax() * RATE / got.shape[1] == pytest.approx(440 * (channel + 1), rel=0.01)


@pytest.mark.parametrize("piece", [1_000, 1_777, 30_000])
def test_pieces_give_the_same_samples_as_the_whole(piece: int) -> None:
    samples = tone()
    assert np.array_equal(stretched(1.7, samples, piece), stretched(1.7, samples, samples.shape[1]))


def test_nothing_in_gives_nothing_out() -> None:
    assert TimeStretch(2.0, RATE, 2).close().shape == (2, 0)


@pytest.mark.parametrize(("speed", "channels"), [(0.2, 1), (4.1, 1), (float("nan"), 1), (2.0, 3)])
def test_what_cannot_be_done_is_refused(speed: float, channels: int) -> None:
    with pytest.raises(InvalidRequestError, match="speed"):
        TimeStretch(speed, RATE, channels)
