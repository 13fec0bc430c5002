"""The way of one chunk of speech from noise to mel frames: time points, Runge-Kutta steps, guidance, noise.

The flow runs from noise at time 0 to the clean mel at time 1. Each engine step is one evaluation of the transformer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vllm_omni.models.qwen2_5_omni.token2wav.transformer import Condition
from vllm_omni.params import MAX_SEED, DiffusionParams
from vllm_omni.worker.diffusion.diffusion_model import Trajectory

MAIN, NULL = "main", "null"
EVALUATIONS = 4  # of one Runge-Kutta step
SWAY = -1.0
DEFAULT_POINTS = 10
DEFAULT_GUIDANCE = 0.5
NEUTRAL_GUIDANCE = 1e-5
NOISE_FRAMES = 64


class RungeKuttaSampler:
    """Kutta's 3/8 rule over the intervals between `time_points`, one evaluation per step: with h the interval and k the
    velocities at its beginning, at both thirds and at its end, y grows by h (k1 + 3 k2 + 3 k3 + k4) / 8.

    timesteps: the times of all evaluations, four per interval. The sample between two steps is the point at which the
    next velocity is wanted.
    """

    def __init__(self, num_points: int) -> None:
        points = time_points(num_points)
        starts, ends = points[:-1], points[1:]
        self._spans = (ends - starts).tolist()
        thirds = [starts + (ends - starts) * (third / 3) for third in (1, 2)]
        self.timesteps = torch.stack([starts, *thirds, ends], dim=1).flatten()
        self._velocities: list[Tensor] = []
        self._start: Tensor | None = None
        self._interval = 0

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool) -> tuple[Tensor, ...]:
        """[1, T, M] velocities at this sample -> the next sample."""
        if self._start is None:
            self._start = sample
        span, start = self._spans[self._interval], self._start
        self._velocities.append(model_output)
        first, *others = self._velocities
        if not others:
            return (start + span / 3 * first,)
        if len(others) == 1:
            return (start + span * (others[0] - first / 3),)
        if len(others) == 2:
            return (start + span * (first - others[0] + others[1]),)
        second, third, fourth = others
        self._velocities, self._start, self._interval = [], None, self._interval + 1
        return (start + span / 8 * (first + 3 * (second + third) + fourth),)


class Token2WavTrajectory(Trajectory):
    """Frames `start` .. `start + num_frames - 1` of the speech, of which `kept` (from `start` on) are the result."""

    def __init__(
        self,
        conditions: Mapping[str, Condition],
        kept: slice,
        num_points: int,
        guidance_scale: float,
        mel_dim: int,
    ) -> None:
        num_frames = len(conditions[MAIN].context)
        self.latent_shape = (num_frames, mel_dim)
        self.sampler = RungeKuttaSampler(num_points)
        self.conditions = conditions
        self.num_tokens = num_frames * len(conditions)
        self.kept = kept
        self._guidance_scale = guidance_scale

    def branches(self, timestep: float) -> tuple[str, ...]:
        return tuple(self.conditions)

    def combine(self, outputs: Sequence[Tensor], timestep: float) -> Tensor:
        main, *null = outputs
        return main + (main - null[0]) * self._guidance_scale if null else main

    def noise(self, generator: torch.Generator) -> Tensor:
        """The same frame of the speech has the same noise in every chunk that holds it."""
        num_frames, mel_dim = self.latent_shape
        return frame_noise(generator.initial_seed(), self.conditions[MAIN].start, num_frames, mel_dim)


def num_points(params: DiffusionParams) -> int:
    """Time points of the flow, which `num_inference_steps` counts."""
    return DEFAULT_POINTS if params.num_inference_steps is None else params.num_inference_steps


def guidance_scale(params: DiffusionParams) -> float:
    return DEFAULT_GUIDANCE if params.guidance_scale is None else params.guidance_scale


def is_guided(params: DiffusionParams) -> bool:
    """Whether the unguided branch runs too."""
    return guidance_scale(params) >= NEUTRAL_GUIDANCE


def time_points(num_points: int) -> Tensor:
    """From 0 to 1, denser at the noise: t - (cos(t pi / 2) - 1 + t) for t in equal steps."""
    even = torch.linspace(0.0, 1.0, num_points, dtype=torch.float32)
    return even + SWAY * (torch.cos(torch.pi / 2 * even) - 1 + even)


def frame_noise(seed: int, start: int, num_frames: int, width: int) -> Tensor:
    """Standard normal [num_frames, width] float32 of the frames from `start` on. Every 64 frames have a generator of
    their own, made from the seed and their place, so that no frame's noise needs that of the frames before it.
    """
    first, last = start // NOISE_FRAMES, (start + num_frames - 1) // NOISE_FRAMES
    drawn = torch.cat([_noise_block(seed, block, width) for block in range(first, last + 1)])
    begin = start - first * NOISE_FRAMES
    return drawn[begin : begin + num_frames]


def _noise_block(seed: int, block: int, width: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{block}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") & MAX_SEED)
    return torch.randn(NOISE_FRAMES, width, generator=generator, dtype=torch.float32)
