"""Peak memory of decoding latents to sound, against the duration: the Oobleck decoder whole (diffusers) and in chunks.

Random weights with the geometry of ACE-Step's autoencoder (48 kHz, 25 frames a second), an eighth of its channels, so
that the longest sound fits whole. Each side runs in a process of its own, whose peak before the work is subtracted; a
peak is that of the longest sound so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.limits import Limits
from benchmarks.measure import ROOT, Options, Report, Table
from benchmarks.sides import SideProcess

PICTURE = ROOT / "benchmarks" / "results" / "decode_memory.png"
SIDES = ("whole", "in chunks")
DURATIONS_S = (10, 60, 240)
QUICK_DURATIONS_S = (20,)  # at 10 s the two are as little as 1.98 apart
FRAMES_PER_S = 25
LATENT_CHANNELS = 64
DECODER_CHANNELS = 16
MAX_ACTIVATION_BYTES = 2**24  # an eighth of the package's own, as the channels are
NUM_SAMPLES = 2000  # that are compared


class Decoder:
    """One way to decode; `side` is one of SIDES."""

    def __init__(self, side: str, dtype: str) -> None:
        import torch
        from diffusers import AutoencoderOobleck

        from vllm_omni.models.ace_step.oobleck import Oobleck
        from vllm_omni.models.ace_step.oobleck_layers import fold_constants, use_channels_last
        from vllm_omni.utils.precision import DTYPES

        torch.manual_seed(0)
        self._vae = AutoencoderOobleck(
            encoder_hidden_size=2,
            downsampling_ratios=[2, 4, 4, 6, 10],
            channel_multiples=[1, 2, 4, 8, 16],
            decoder_channels=DECODER_CHANNELS,
            decoder_input_channels=LATENT_CHANNELS,
            sampling_rate=48_000,
        ).to(DTYPES[dtype])
        self._vae.requires_grad_(False).eval()
        is_ours = side == "in chunks"
        self._oobleck = Oobleck(use_channels_last(fold_constants(self._vae)), MAX_ACTIVATION_BYTES) if is_ours else None

    def run(self, duration_s: int, repeat: int) -> list[float]:
        """Evenly spaced samples of the sound."""
        import torch

        latents = torch.randn(duration_s * FRAMES_PER_S, LATENT_CHANNELS, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            if self._oobleck is None:
                audio = self._vae.decode(latents.T[None].to(self._vae.dtype)).sample[0].float()
            else:
                audio = torch.cat(list(self._oobleck.decode(latents)), dim=1)
        values: list[float] = audio.flatten()[:: max(1, audio.numel() // NUM_SAMPLES)].tolist()
        return values


@dataclass(frozen=True, slots=True)
class Found:
    """Of one duration, in the order of SIDES: MiB beyond what the process held before, and seconds. difference: the
    largest, of the peak.
    """

    duration_s: int
    memory_mb: tuple[float, float]
    seconds: tuple[float, float]
    difference: float

    def cells(self) -> list[str]:
        memory, seconds = [f"{value:.0f}" for value in self.memory_mb], [f"{value:.1f}" for value in self.seconds]
        return [f"{self.duration_s} s", *memory, *seconds, f"{self.difference:.1e}"]


COLUMNS = ("sound", *(f"{side}, MiB" for side in SIDES), *(f"{side}, s" for side in SIDES), "largest difference")


def run(options: Options, limits: Limits | None = None) -> Report:
    durations = QUICK_DURATIONS_S if options.is_quick else DURATIONS_S
    sides = [measured(side, durations, options) for side in SIDES]
    found = [
        Found(
            duration_s,
            (whole.memory_mb, chunked.memory_mb),
            (whole.seconds, chunked.seconds),
            difference(whole, chunked),
        )
        for duration_s, whole, chunked in zip(durations, *sides, strict=True)
    ]
    notes = [
        f"{DECODER_CHANNELS} channels at full rate; ACE-Step's decoder has 128, and needs eight times as much either "
        "way. The finished sound is in both figures.",
    ]
    if not options.is_quick:
        draw(found, PICTURE)
        notes.append(f"![Memory against duration]({PICTURE.name})")
    return Report(
        "decode_memory",
        [Table(f"Memory of decoding, {options.dtype}", COLUMNS, [one.cells() for one in found])],
        notes=notes,
        figures={"cases": [asdict(one) for one in found]},
    )


@dataclass(frozen=True, slots=True)
class Decoded:
    """By one side. samples: some of its sound."""

    memory_mb: float
    seconds: float
    samples: Sequence[float]


def measured(side: str, durations: Sequence[int], options: Options) -> list[Decoded]:
    """durations: ascending."""
    found = []
    with SideProcess(side, options.threads, Decoder, side, options.dtype) as process:
        before = process.peak_memory_mb()
        for duration_s in durations:
            took_s, samples = process.call("run", duration_s, 0)
            found.append(Decoded(process.peak_memory_mb() - before, took_s, samples))
    return found


def difference(whole: Decoded, chunked: Decoded) -> float:
    """The largest between two sounds, of the first one's peak."""
    pairs = zip(whole.samples, chunked.samples, strict=True)
    return max(abs(a - b) for a, b in pairs) / max(map(abs, whole.samples))


def draw(found: Sequence[Found], path: Path) -> None:
    """Memory against duration as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, side in enumerate(SIDES):
        axes.plot([one.duration_s for one in found], [one.memory_mb[index] for one in found], marker="o", label=side)
    axes.set(xlabel="sound, s", ylabel="peak memory of decoding, MiB", xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
