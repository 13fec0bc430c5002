"""Channels of a sound, mixed down with the weights of ITU-R BS.775 (centre and surround by the root of a half, without
the bass channel), scaled so that nothing is louder than full scale.
"""

from __future__ import annotations

import math

import numpy as np

from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio_files import Samples

HALF = math.sqrt(0.5)
LEFT, RIGHT, CENTRE, BASS, BACK = (1.0, 0.0), (0.0, 1.0), (HALF, HALF), (0.0, 0.0), (HALF / 2, HALF / 2)
BACK_LEFT, BACK_RIGHT = (HALF, 0.0), (0.0, HALF)
# number of channels -> what each adds to left and right, in the order of WAV files and of FFmpeg
WEIGHTS = {
    2: (LEFT, RIGHT),
    3: (LEFT, RIGHT, CENTRE),
    4: (LEFT, RIGHT, BACK_LEFT, BACK_RIGHT),
    5: (LEFT, RIGHT, CENTRE, BACK_LEFT, BACK_RIGHT),
    6: (LEFT, RIGHT, CENTRE, BASS, BACK_LEFT, BACK_RIGHT),
    7: (LEFT, RIGHT, CENTRE, BASS, BACK, BACK_LEFT, BACK_RIGHT),
    8: (LEFT, RIGHT, CENTRE, BASS, BACK_LEFT, BACK_RIGHT, BACK_LEFT, BACK_RIGHT),
}
MAX_CHANNELS = max(WEIGHTS)


def check_channels(num_channels: int, wanted: int, name: str) -> None:
    """InvalidRequestError for channels that cannot become the wanted number."""
    if num_channels in (1, wanted) or (wanted in (1, 2) and num_channels in WEIGHTS):
        return
    expected = f"1 to {MAX_CHANNELS}" if wanted in (1, 2) else f"1 or {wanted}"
    raise InvalidRequestError(f"{name}: got {num_channels} channels, expected {expected}; arrays are [channels, n]")


def mixed(block: Samples, wanted: int) -> Samples:
    """[frames, any] -> [frames, wanted]: one channel is repeated, several are mixed into two or one."""
    num_channels = block.shape[1]
    if num_channels == wanted:
        return block
    if num_channels == 1:
        return np.repeat(block, wanted, axis=1)
    weights = np.array(WEIGHTS[num_channels], np.float32)
    weights /= weights.sum(axis=0).max()
    return block @ (weights if wanted == 2 else weights.mean(axis=1, keepdims=True))
