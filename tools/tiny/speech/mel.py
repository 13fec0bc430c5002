"""Log-mel spectrograms on the scale that the published vocoder takes: natural logarithms of amplitudes, of which it
keeps what lies between -10.9 and 2.3. Speech is brought near the upper end.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_RATE = 24_000
HOP = 240
WINDOW = 1024
NUM_BANDS = 80
TOP_HZ = 11_025.0  # the synthesiser makes nothing above
GAIN = 0.25
FLOOR, CEILING = -5.5, 2.3  # what is softer stands as silence; one frame in 250 has a band that is louder


def log_mel(waveform: Tensor) -> Tensor:
    """float32 [n] at 24 kHz -> [ceil(n / 240), 80]; frame i is centred on the samples 240 i to 240 (i + 1)."""
    num_frames = -(-len(waveform) // HOP)
    edge = (WINDOW - HOP) // 2
    padded = F.pad(waveform, (edge, edge + num_frames * HOP - len(waveform)))
    spectrum = torch.stft(padded, WINDOW, HOP, window=torch.hann_window(WINDOW), center=False, return_complex=True)
    return (GAIN * (filters() @ spectrum.abs())).log().clamp(FLOOR, CEILING).T.contiguous()


@functools.cache
def filters() -> Tensor:
    """[80, 513] triangles, evenly spaced in mel (O'Shaughnessy's formula), the weights of each with the sum 1."""
    top = 2595 * math.log10(1 + TOP_HZ / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, NUM_BANDS + 2) / 2595) - 1)
    bins = torch.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1)
    rising = (bins - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - bins) / (corners[2:] - corners[1:-1])[:, None]
    weights = torch.minimum(rising, falling).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)
