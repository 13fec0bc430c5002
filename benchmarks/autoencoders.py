"""Latents decoded by the autoencoders of published pipelines, in their published shapes with random weights: as a stage
decodes them, against diffusers' with its best memory format (channels last).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.limits import Limits
from benchmarks.measure import Options, Report, Table
from benchmarks.sides import Duel, SideProcess, duels

LATENT_PIXELS = 8
# kind of autoencoder -> (dtype, pixels of a side, frames of latents), each a case
CASES: dict[str, tuple[tuple[str, int, int], ...]] = {
    "Z-Image": (("bfloat16", 256, 1), ("bfloat16", 512, 1), ("float32", 256, 1), ("float32", 512, 1)),
    "Qwen-Image": (("bfloat16", 512, 1), ("float32", 512, 1)),
    "Wan 2.1": (("float32", 128, 3),),
}
QUICK_CASES: dict[str, tuple[tuple[str, int, int], ...]] = {
    "Z-Image": (("bfloat16", 32, 1),),
    "Qwen-Image": (("float32", 32, 1),),
    "Wan 2.1": (("float32", 16, 2),),
}
COLUMNS = ("case", "ours, a second", "diffusers, a second", "ours / diffusers", "largest difference")


@dataclass(frozen=True, slots=True)
class Case:
    """frames: of latents; of a film each but the first is four."""

    pixels: int
    frames: int

    def latents(self, channels: int, repeat: int) -> Any:
        """[1, C, frames, h, w] float32."""
        import torch

        side = self.pixels // LATENT_PIXELS
        return torch.randn(1, channels, self.frames, side, side, generator=torch.Generator().manual_seed(repeat))


def random_module(kind: str, dtype: str, *, is_quick: bool) -> Any:
    """An autoencoder of diffusers with the same random weights each time."""
    import torch
    from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan
    from diffusers.utils import logging

    from benchmarks.gpu_shapes import VAE
    from vllm_omni.utils.precision import DTYPES

    logging.set_verbosity_error()
    torch.manual_seed(0)
    if kind == "Z-Image":
        widths = {"block_out_channels": (32, 32, 64, 64), "norm_num_groups": 8} if is_quick else {}
        module = AutoencoderKL(**{**VAE, **widths})
    else:  # the published ones are the classes' own
        part = AutoencoderKLWan if kind == "Wan 2.1" else AutoencoderKLQwenImage
        module = part(base_dim=32) if is_quick else part()
    return module.eval().requires_grad_(False).to(DTYPES[dtype])


class Ours:
    """As a stage decodes."""

    def __init__(self, kind: str, dtype: str, is_quick: bool) -> None:
        import torch

        from vllm_omni.models.qwen_image.vae import PictureVae
        from vllm_omni.models.wan.vae import FilmVae
        from vllm_omni.worker.diffusion.picture_autoencoder import use_kernels

        module, cpu = random_module(kind, dtype, is_quick=is_quick), torch.device("cpu")
        self._module, self._kind = module, kind
        if kind == "Z-Image":
            use_kernels(module.to(memory_format=torch.channels_last))
        else:
            self._vae: Any = (FilmVae if kind == "Wan 2.1" else PictureVae)(module, cpu)

    def run(self, case: Case, repeat: int) -> np.ndarray:
        """[frames, H, W, 3]."""
        import torch

        from vllm_omni.layers.native.results import reused_results
        from vllm_omni.worker.diffusion.previewer import to_pixels

        with torch.inference_mode(), reused_results():
            latents = case.latents(16, repeat)[0]
            if self._kind == "Wan 2.1":
                return torch.cat(list(self._vae.decode(latents))).numpy()
            if self._kind == "Qwen-Image":
                return to_pixels(self._vae.decode(latents[:, 0])).numpy()
            read = latents[:, 0][None].to(self._module.dtype).contiguous(memory_format=torch.channels_last)
            return to_pixels(self._module.decode(read).sample[0].float() / 2 + 0.5).numpy()


class Diffusers:
    def __init__(self, kind: str, dtype: str, is_quick: bool) -> None:
        import torch

        module = random_module(kind, dtype, is_quick=is_quick)
        self._is_film = kind != "Z-Image"
        self._format = torch.channels_last_3d if self._is_film else torch.channels_last
        for parameter in module.parameters():  # those of the other number of axes stay as they are
            if parameter.ndim == (5 if self._is_film else 4):
                parameter.data = parameter.data.contiguous(memory_format=self._format)
        self._module = module

    def run(self, case: Case, repeat: int) -> np.ndarray:
        """[frames, H, W, 3]."""
        import torch

        from vllm_omni.worker.diffusion.previewer import to_pixels

        latents = case.latents(16, repeat)
        if self._is_film:
            config = self._module.config
            mean, deviation = (torch.tensor(x)[:, None, None, None] for x in (config.latents_mean, config.latents_std))
            latents = latents * deviation + mean
        else:
            latents = latents[:, :, 0]
        read = latents.to(self._module.dtype).contiguous(memory_format=self._format)
        with torch.inference_mode():
            found = self._module.decode(read).sample[0].float() / 2 + 0.5
            frames = found.transpose(0, 1) if self._is_film else found[None]
            return torch.stack([to_pixels(frame) for frame in frames]).numpy()


def run(options: Options, limits: Limits | None = None) -> Report:
    rows: list[Duel] = []
    for kind, cases in (QUICK_CASES if options.is_quick else CASES).items():
        for dtype in dict.fromkeys(dtype for dtype, _, _ in cases):
            with ExitStack() as stack:
                us, peer = (
                    stack.enter_context(SideProcess(name, options.threads, side, kind, dtype, options.is_quick))
                    for name, side in (("vllm_omni", Ours), ("diffusers", Diffusers))
                )
                chosen = [
                    (f"{kind}, {pixels} px{_of_frames(frames)}, {dtype}", 1.0, Case(pixels, frames))
                    for held, pixels, frames in cases
                    if held == dtype
                ]
                rows += duels(us, peer, chosen, largest_difference, options)
    table = Table("Decoding", COLUMNS, [duel.cells() for duel in rows])
    notes = ["Random weights of the published shapes: speed and equality only."]
    return Report("autoencoders", [table], notes, {"duels": [duel.figures() for duel in rows]})


def _of_frames(frames: int) -> str:
    return "" if frames == 1 else f", {4 * frames - 3} frames"


def largest_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> str:
    difference = np.abs(np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float))
    return f"{difference.max():.0f} of 255, {difference.mean():.2f} on average"
