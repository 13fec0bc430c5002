"""Files of sound as a player reads them."""

from __future__ import annotations

import io

import av
import numpy as np
import numpy.typing as npt
import soundfile

Samples = npt.NDArray[np.float32]


def read_file(content: bytes) -> tuple[Samples, int]:
    """[channels, n] and the rate, of any format, by FFmpeg."""
    with av.open(io.BytesIO(content)) as container:
        rate = container.streams.audio[0].rate
        resampler = av.AudioResampler(format="fltp")
        frames = [made for frame in container.decode(audio=0) for made in resampler.resample(frame)]
        return np.concatenate([frame.to_ndarray() for frame in frames], axis=1), rate


def read_integers(content: bytes) -> npt.NDArray[np.int16]:
    """[n] of a mono file of 16 or more bits, rounded to 16."""
    samples, _ = read_file(content)
    return np.clip(np.rint(samples[0] * 2**15), -(2**15), 2**15 - 1).astype(np.int16)


def read_pcm(content: bytes) -> npt.NDArray[np.int16]:
    return np.frombuffer(content, "<i2").astype(np.int16)


def comment_of(content: bytes) -> str:
    """What a file says of itself."""
    with soundfile.SoundFile(io.BytesIO(content)) as file:
        return str(file.comment)
