"""A picture of a sound: the waveform above, its mel spectrogram below. Knows numbers, no stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]

WINDOW_S = 0.064
MAX_COLUMNS = 1_500
DB_RANGE = 80.0


def draw_audio(samples: Samples, sample_rate: int, path: Path) -> None:
    """Writes a PNG. samples: float32 [channels, n]; axes in seconds and Hz, power in dB below the loudest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)  # no pyplot: nothing global is touched
    wave, mel = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    mono = samples.mean(axis=0) if samples.size else np.zeros(1, np.float32)  # nothing is drawn as silence
    duration_s = len(mono) / sample_rate
    _draw_wave(wave, mono, duration_s)
    mesh = _draw_mel(mel, mono, sample_rate)
    figure.colorbar(mesh, ax=mel, label="power (dB)")
    wave.set_xlim(0, duration_s)
    canvas.print_png(path)


def _draw_wave(axes: Any, mono: Samples, duration_s: float) -> None:
    """Lowest and highest sample of each column, so that no peak is lost however long the sound is."""
    starts = np.unique(np.linspace(0, len(mono), min(MAX_COLUMNS, len(mono)), endpoint=False).astype(int))
    times = starts / len(mono) * duration_s
    low, high = np.minimum.reduceat(mono, starts), np.maximum.reduceat(mono, starts)
    axes.fill_between(times, low, high, step="post", linewidth=0.5, edgecolor="C0")
    peak = max(float(np.abs(mono).max()), 1e-3)
    axes.set_ylim(-1.05 * peak, 1.05 * peak)
    axes.set_ylabel("amplitude")


def _draw_mel(axes: Any, mono: Samples, sample_rate: int) -> Any:
    from transformers.audio_utils import mel_filter_bank, mel_to_hertz, spectrogram, window_function

    window = 1 << max(6, round(np.log2(WINDOW_S * sample_rate)))
    hop = max(window // 4, -(-len(mono) // MAX_COLUMNS))
    num_mels = min(128, max(8, window // 16))
    filters = mel_filter_bank(window // 2 + 1, num_mels, 0.0, sample_rate / 2, sample_rate)
    power = spectrogram(
        mono,
        window_function(window, "hann"),
        frame_length=window,
        hop_length=hop,
        power=2.0,
        pad_mode="constant",
        mel_filters=filters,
        log_mel="dB",
        reference=1.0,
    )
    power = power - power.max()
    times = (np.arange(power.shape[1] + 1) - 0.5) * hop / sample_rate
    top = float(_to_mel(sample_rate / 2))
    edges = mel_to_hertz(np.linspace(0.0, top, num_mels + 1))
    mesh = axes.pcolormesh(times, edges, power, vmin=-DB_RANGE, vmax=0.0, cmap="magma", rasterized=True)
    axes.set_yscale("function", functions=(_to_mel, mel_to_hertz))
    marks = [mark for mark in (0, 125, 250, 500, 1000, 2000, 4000, 8000, 16000) if mark <= sample_rate / 2]
    axes.set_yticks(marks, [str(mark) for mark in marks])
    axes.set_xlabel("time (s)")
    axes.set_ylabel("frequency (Hz)")
    return mesh


def _to_mel(hertz: Any) -> Any:
    from transformers.audio_utils import hertz_to_mel

    return hertz_to_mel(hertz)
