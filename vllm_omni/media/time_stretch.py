"""Sound that is said faster or slower at the same pitch, piece by piece. FFmpeg's `atempo` does the work."""

from __future__ import annotations

from collections.abc import Iterator

import av
import av.error
import av.filter
import numpy as np

from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio_files import Samples
from vllm_omni.utils.checks import check_number

MIN_SPEED, MAX_SPEED = 0.25, 4.0
MIN_TEMPO, MAX_TEMPO = 0.5, 2.0  # of one filter: beyond, it skips samples or cannot be made
LAYOUTS = {1: "mono", 2: "stereo"}


class TimeStretch:
    """What `write` and `close` return, put together, is the sound at `speed`: at 2 it lasts half as long.

    InvalidRequestError for a speed outside 0.25 ... 4 and for more than two channels.
    """

    def __init__(self, speed: float, sample_rate: int, channels: int) -> None:
        check_number("speed", speed, MIN_SPEED, MAX_SPEED, raises=InvalidRequestError)
        if channels not in LAYOUTS:
            raise InvalidRequestError(f"speed: got a sound of {channels} channels, expected 1 or 2; leave speed out")
        self._rate, self._channels = sample_rate, channels
        self._num_written = 0
        self._graph = av.filter.Graph()
        source = self._graph.add_abuffer(sample_rate=sample_rate, format="fltp", layout=LAYOUTS[channels])
        tempos = [self._graph.add("atempo", f"{tempo:.6f}") for tempo in _tempos(speed)]
        planar = self._graph.add("aformat", "sample_fmts=fltp")
        self._graph.link_nodes(source, *tempos, planar, self._graph.add("abuffersink")).configure()

    def write(self, samples: Samples) -> Samples:
        """samples: float32 [channels, n]. Returns what is ready, which may be nothing: [channels, 0]."""
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=LAYOUTS[self._channels])
        frame.sample_rate, frame.pts = self._rate, self._num_written
        self._num_written += samples.shape[1]
        self._graph.push(frame)
        return self._ready()

    def close(self) -> Samples:
        """What is left."""
        if not self._num_written:
            return np.empty((self._channels, 0), np.float32)
        self._graph.push(None)
        return self._ready()

    def _ready(self) -> Samples:
        pieces = [np.empty((self._channels, 0), np.float32), *self._frames()]
        return np.concatenate(pieces, axis=1)

    def _frames(self) -> Iterator[Samples]:
        while True:
            try:
                frame = self._graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            assert isinstance(frame, av.AudioFrame)
            yield frame.to_ndarray().astype(np.float32, copy=False)


def _tempos(speed: float) -> list[float]:
    """Factors within a filter's range whose product is `speed`."""
    tempos = []
    while not MIN_TEMPO <= speed <= MAX_TEMPO:
        tempo = MIN_TEMPO if speed < MIN_TEMPO else MAX_TEMPO
        tempos.append(tempo)
        speed /= tempo
    return [*tempos, speed]
