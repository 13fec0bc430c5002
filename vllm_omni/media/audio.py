"""A sound as the caller holds it: samples and their rate, to be saved, drawn and listened to. Knows no stage."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vllm_omni.errors import InvalidRequestError
from vllm_omni.utils.checks import check_number
from vllm_omni.utils.files import check_suffix, write_whole

if TYPE_CHECKING:
    from vllm_omni.media.audio_files import Samples

MIN_SAMPLE_RATE = 1_000
MAX_SAMPLE_RATE = 384_000
MAX_INLINE_S = 120.0


@dataclass(frozen=True, slots=True, eq=False)
class Audio:
    """Samples and their rate; the data is not copied.

    It may have no samples, where there was nothing to say. InvalidRequestError for another shape or dtype, a rate
    outside 1,000 to 384,000 Hz, and samples that are not finite.
    """

    samples: Samples  # float32 [channels, n], -1 to 1 at full scale, read-only
    sample_rate: int  # Hz
    start: int = 0  # where a part of longer audio begins in it, in samples

    def __post_init__(self) -> None:
        check_number(
            "sample_rate",
            self.sample_rate,
            MIN_SAMPLE_RATE,
            MAX_SAMPLE_RATE,
            integer=True,
            raises=InvalidRequestError,
            hint=" (Hz)",
        )
        samples = self.samples
        if not isinstance(samples, np.ndarray) or samples.dtype != np.float32 or samples.ndim != 2 or not len(samples):
            got = (
                f"{samples.dtype} {list(samples.shape)}" if isinstance(samples, np.ndarray) else type(samples).__name__
            )
            raise InvalidRequestError(f"samples: got {got}, expected a numpy array float32 [channels, n]")
        if not np.isfinite(samples).all():
            raise InvalidRequestError("samples: got NaN or infinite ones, expected finite numbers")
        view = samples.view()
        view.flags.writeable = False
        object.__setattr__(self, "samples", view)

    @property
    def num_channels(self) -> int:
        return int(self.samples.shape[0])

    @property
    def duration_s(self) -> float:
        return float(self.samples.shape[1] / self.sample_rate)

    def save(self, path: str | Path) -> None:
        """Writes `.wav` (16 bit), `.flac` (24 bit), `.ogg` (Vorbis), `.opus`, `.mp3`, `.aac` or `.pcm`; samples beyond
        -1 ... 1 are cut there. A file that cannot be written whole is not there at all.

        InvalidRequestError for another suffix or for channels and rates that the format does not hold, OSError when the
        file cannot be written.
        """
        from vllm_omni.media.audio_encoding import AUDIO_SUFFIXES, encode_audio

        path = Path(path).expanduser()
        check_suffix(path, tuple(AUDIO_SUFFIXES))
        write_whole(path, encode_audio(self, AUDIO_SUFFIXES[path.suffix.lower()]))

    def plot(self, path: str | Path) -> None:
        """Writes a `.png`: the waveform above, the mel spectrogram below, both of the mean of the channels."""
        from vllm_omni.utils.plots.audio_plot import draw_audio

        path = Path(path).expanduser()
        check_suffix(path, (".png",))
        draw_audio(self.samples, self.sample_rate, path)

    def __repr__(self) -> str:
        channels = {1: "mono", 2: "stereo"}.get(self.num_channels, f"{self.num_channels} channels")
        return f"Audio({self.duration_s:.2f} s, {channels}, {self.sample_rate} Hz)"

    def _repr_html_(self) -> str:
        """A player for notebooks, the sound within it; a long one (more than two minutes) is only named."""
        from vllm_omni.media.audio_encoding import encode_audio

        if self.duration_s > MAX_INLINE_S:
            return f"<code>{self!r}</code>: too long to play here, <code>save()</code> it"
        content = base64.b64encode(encode_audio(self, "wav")).decode()
        return f'<audio controls src="data:audio/wav;base64,{content}" title="{self!r}"></audio>'
