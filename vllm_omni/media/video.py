"""A video as the caller holds it: frames, how fast they follow each other, the sound that goes with them. Knows no
stage.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio import Audio
from vllm_omni.params import MAX_FPS, MIN_FPS
from vllm_omni.utils.checks import check_number
from vllm_omni.utils.files import check_suffix, write_whole

if TYPE_CHECKING:
    from PIL.Image import Image

Frames = npt.NDArray[np.uint8]
MAX_INLINE_PIXELS = 50_000_000  # of all frames, in a notebook


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """Frames and their rate; the data is not copied.

    InvalidRequestError for another shape or dtype, for no frame at all, and for a rate outside 1 to 240.
    """

    frames: Frames  # uint8 [n, height, width, 3], RGB, read-only
    fps: float  # frames per second
    audio: Audio | None = None  # begins with the first frame

    def __post_init__(self) -> None:
        check_number("fps", self.fps, MIN_FPS, MAX_FPS, raises=InvalidRequestError)
        frames = self.frames
        is_array = isinstance(frames, np.ndarray)
        if not is_array or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
            got = f"{frames.dtype} {list(frames.shape)}" if is_array else type(frames).__name__
            raise InvalidRequestError(f"frames: got {got}, expected a numpy array uint8 [n, height, width, 3]")
        view = frames.view()
        view.flags.writeable = False
        object.__setattr__(self, "frames", view)

    @property
    def num_frames(self) -> int:
        return int(self.frames.shape[0])

    @property
    def height(self) -> int:
        return int(self.frames.shape[1])

    @property
    def width(self) -> int:
        return int(self.frames.shape[2])

    @property
    def duration_s(self) -> float:
        return self.num_frames / self.fps

    def frame(self, index: int) -> Image:
        """One frame as a picture of its own; IndexError beyond the last. Negative ones count from the end."""
        from PIL import Image

        return Image.fromarray(self.frames[index])

    def save(self, path: str | Path) -> None:
        """Writes `.mp4` (H.264), `.webm` (VP9), both with the sound, or the silent animations `.gif` and `.webp`. A
        file that cannot be written whole is not there at all.

        InvalidRequestError for another suffix and for rates and sizes that the format does not hold, OSError when the
        file cannot be written.
        """
        from vllm_omni.media.video_encoding import VIDEO_SUFFIXES, encode_video

        path = Path(path).expanduser()
        check_suffix(path, tuple(VIDEO_SUFFIXES))
        write_whole(path, encode_video(self, VIDEO_SUFFIXES[path.suffix.lower()]))

    def __repr__(self) -> str:
        sound = "" if self.audio is None else ", with sound"
        return (
            f"Video({self.duration_s:.2f} s, {self.num_frames} frames of {self.width}x{self.height}, {self.fps:g} fps"
            f"{sound})"
        )

    def _repr_html_(self) -> str:
        """A player for notebooks, the video within it; a large one (50 million pixels in all frames) is only named."""
        from vllm_omni.media.video_encoding import encode_video

        if self.frames.size // 3 > MAX_INLINE_PIXELS:
            return f"<code>{self!r}</code>: too large to play here, <code>save()</code> it"
        content = base64.b64encode(encode_video(self, "mp4")).decode()
        return f'<video controls loop src="data:video/mp4;base64,{content}" title="{self!r}"></video>'
